"""The record of replies: on disk before it counts, whole after any crash."""

import pytest

from dominie.core.errors import InputError
from dominie.generation.calls import Ledger, call_key


def test_what_was_appended_is_found_again(tmp_path):
    ledger = Ledger(tmp_path / "deep" / "l.jsonl")
    ledger.append({"key": "a", "body": "é\n"})
    ledger.append({"key": "b", "body": 1})
    ledger.append({"key": "a", "body": 2})
    assert [r["body"] for r in Ledger(ledger.path).of("a")] == ["é\n", 2]
    assert Ledger(ledger.path).of("c") == []
    assert len(Ledger(ledger.path).records) == 3


def test_a_line_torn_at_any_byte_is_taken_out_and_the_rest_kept(tmp_path):
    whole = Ledger(tmp_path / "l.jsonl")
    whole.append({"key": "a", "body": "one"})
    first = whole.path.stat().st_size
    whole.append({"key": "b", "body": "two é"})
    content = whole.path.read_bytes()
    for cut in range(first, len(content)):
        path = tmp_path / "torn.jsonl"
        path.write_bytes(content[:cut])
        torn = Ledger(path)
        assert len(torn.of("a")) == 1
        assert torn.of("b") == []
        torn.append({"key": "c", "body": "three"})
        torn.close()
        assert [r["key"] for r in Ledger(path).records] == ["a", "c"]


@pytest.mark.parametrize("line", ["nonsense", "[]", '{"body": 1}', '{"key": 7}'])
def test_damage_elsewhere_is_an_error_with_its_place(tmp_path, line):
    path = tmp_path / "l.jsonl"
    path.write_text('{"key": "a"}\n' + line + '\n{"key": "b"}\n')
    with pytest.raises(InputError, match=r"l\.jsonl:2"):
        Ledger(path)


def test_a_key_changes_with_everything_a_reply_depends_on():
    def body(**changed):
        chat = [{"role": "user", "content": "hi"}]
        return {"messages": chat, "temperature": 0.0, "max_tokens": 5, **changed}

    identity = {"endpoint": "http://h/v1", "model": "m"}
    keys = {
        call_key(identity, body()),
        call_key({**identity, "model": "n"}, body()),
        call_key({**identity, "endpoint": "http://g/v1"}, body()),
        call_key(identity, body(temperature=0.7)),
        call_key(identity, body(max_tokens=6)),
        call_key(identity, body(messages=[{"role": "user", "content": "hi "}])),
        call_key(identity, body(messages=[{"role": "system", "content": "hi"}])),
    }
    assert len(keys) == 7
    assert call_key(identity, body()) in keys
