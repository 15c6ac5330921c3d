"""The reply log: on disk before a reply counts, whole after any crash; replies are not trusted."""

import contextlib
import json

import pytest

from dominie.core.errors import InputError
from dominie.generation.reply_log import Reply, ReplyLog, call_key, read_reply


def test_what_was_appended_is_found_again(tmp_path):
    log = ReplyLog(tmp_path / "deep" / "l.jsonl")
    log.append({"key": "a", "body": "é\n"})
    log.append({"key": "b", "body": 1})
    log.append({"key": "a", "body": 2})
    assert [r["body"] for r in ReplyLog(log.path).of("a")] == ["é\n", 2]
    assert ReplyLog(log.path).of("c") == []
    assert len(ReplyLog(log.path).records) == 3


def test_a_line_torn_at_any_byte_is_taken_out_and_the_rest_kept(tmp_path):
    whole = ReplyLog(tmp_path / "l.jsonl")
    whole.append({"key": "a", "body": "one"})
    first = whole.path.stat().st_size
    whole.append({"key": "b", "body": "two é"})
    content = whole.path.read_bytes()
    for cut in range(first, len(content)):
        path = tmp_path / "torn.jsonl"
        path.write_bytes(content[:cut])
        torn = ReplyLog(path)
        assert len(torn.of("a")) == 1
        kept = ["b"] if cut == len(content) - 1 else []  # its line end alone is missing
        assert len(torn.of("b")) == len(kept)
        torn.append({"key": "c", "body": "three"})
        assert [r["key"] for r in ReplyLog(path).records] == ["a", *kept, "c"]


def test_no_flipped_bit_changes_a_reply_or_loses_one_that_was_paid_for(tmp_path):
    log = ReplyLog(tmp_path / "l.jsonl")
    for key in "ab":
        log.append({"key": key, "status": 200, "body": f"[[7]] {key} é", "cost": 0.5})
    content, whole = log.path.read_bytes(), log.records
    path, refused = tmp_path / "flipped.jsonl", 0
    for place, byte in enumerate(content):
        for bit in (1, 2, 16, 64):
            path.write_bytes(content[:place] + bytes([byte ^ bit]) + content[place + 1 :])
            try:
                found = ReplyLog(path).records
            except InputError:
                refused += 1
                continue
            # Accepted is what has lost the name of its checksum, or a line end, alone.
            assert [{k: r.get(k) for k in whole[0]} for r in found] == whole
    assert refused > 3 * len(content)


@pytest.mark.parametrize(
    ("sent", "expected"),
    [
        ("Great \\ud83d", "Great \ufffd"),
        ("\\ude00 no", "\ufffd no"),
        ("\\ud83d\\ude00", "\U0001f600"),
        ("a\\ud83d\\ud83d\\ude00", "a\ufffd\U0001f600"),
    ],
)
def test_half_a_surrogate_pair_is_a_replacement_character(tmp_path, sent, expected):
    body = f'{{"choices": [{{"message": {{"content": "{sent}"}}}}]}}'
    assert read_reply(body).text == expected
    log = ReplyLog(tmp_path / "l.jsonl")
    log.append({"key": call_key(read_reply(body).text), "status": 200, "body": body})
    (record,) = ReplyLog(log.path).records
    assert read_reply(record["body"]).text == expected


@pytest.mark.parametrize(
    "content",
    [
        '"a\nb"',
        '{"type": "text", "text": "a\\nb"}',
        '[{"type": "text", "text": {"value": "a\\nb", "annotations": []}}]',
    ],
)
def test_a_reply_in_the_forms_that_servers_write(content):
    body = '\ufeff{"choices": [{"message": {"content": CONTENT}, "finish_reason": "stop"}]}'
    assert read_reply(body.replace("CONTENT", content)).text == "a\nb"


def test_a_filter_that_says_which_rule_it_follows_refuses():
    choice = {"message": {"role": "assistant"}, "finish_reason": "content_filter: OTHER"}
    assert read_reply(json.dumps({"choices": [choice]})).refused


def test_halves_of_a_pair_in_two_parts_are_one_character():
    parts = '[{"type": "text", "text": "a\\ud83d"}, {"type": "text", "text": "\\ude00"}]'
    body = f'{{"choices": [{{"message": {{"content": {parts}}}}}]}}'
    assert read_reply(body).text == "a\U0001f600"


@pytest.mark.parametrize("line", ["nonsense", "[]", '{"body": 1}', '{"key": 7}'])
def test_damage_elsewhere_is_an_error_with_its_place(tmp_path, line):
    path = tmp_path / "l.jsonl"
    path.write_text('{"key": "a"}\n' + line + '\n{"key": "b"}\n')
    with pytest.raises(InputError, match=r"l\.jsonl:2"):
        ReplyLog(path)


def test_a_changed_character_is_found_wherever_it_is(tmp_path):
    log = ReplyLog(tmp_path / "l.jsonl")
    log.append({"key": "a", "status": 200, "body": "Rating: [[7]] é"})
    log.append({"key": "b", "cost": 0.25})
    content = log.path.read_bytes()
    first = content.index(b"\n") + 1
    accepted = 0
    for at in range(first):
        for flipped in (content[at] ^ 1, content[at] ^ 4):
            log.path.write_bytes(content[:at] + bytes([flipped]) + content[at + 1 :])
            with contextlib.suppress(InputError):
                assert ReplyLog(log.path).of("a")[0]["body"] == "Rating: [[7]] é"
                accepted += 1
    assert accepted <= 2 * len("checksum"), "in the name of the checksum alone"
    log.path.write_text('{"key": "a", "body": "of an earlier version"}\n')
    assert len(ReplyLog(log.path).of("a")) == 1


@pytest.mark.parametrize("reason", ["error", "abort", "ERROR"])
def test_a_reply_that_failed_is_none(reason):
    choice = {"message": {"content": "The capital of"}, "finish_reason": reason}
    assert read_reply(json.dumps({"choices": [choice]})) is None
    whole = {**choice, "finish_reason": "stop"}
    assert read_reply(json.dumps({"choices": [whole]})) == Reply("The capital of")
    assert read_reply(json.dumps({"choices": [{**whole, "error": {"code": 502}}]})) is None
    assert read_reply(json.dumps({"choices": [whole], "error": {"code": 502}})) is None


@pytest.mark.parametrize("reason", ["content_filter", "SAFETY", "refusal"])
@pytest.mark.parametrize("content", ["I", "", None])
def test_a_reply_that_a_filter_took_away_is_refused(reason, content):
    choice = {"message": {"content": content}, "finish_reason": reason}
    assert read_reply(json.dumps({"choices": [choice]})) == Reply(content or "", refused=True)


@pytest.mark.parametrize("reason", ["length", "max_tokens", "MAX_TOKENS", "model_length"])
def test_a_reply_that_its_limit_cut_off(reason):
    choice = {"message": {"content": "The capital"}, "finish_reason": reason}
    assert read_reply(json.dumps({"choices": [choice]})) == Reply("The capital", cut=True)


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


@pytest.mark.parametrize(
    "body",
    [
        "",
        "{",
        "[]",
        '"text"',
        '{"choices": []}',
        '{"choices": [{"message": {"content": null}}]}',
        '{"choices": [{"message": {"content": 7}}]}',
        '{"choices": {"message": 1}}',
        "[" * 100_000,
    ],
)
def test_a_body_without_a_reply(body):
    assert read_reply(body) is None


def test_a_server_is_not_believed_in_everything():
    body = (
        '{"choices": [{"message": {"content": "x"}, "finish_reason": "length", "logprobs": '
        '{"content": [{"top_logprobs": [{"token": "m", "logprob": 3.0}, '
        '{"token": "M", "logprob": -1.0}]}]}}], '
        '"usage": {"prompt_tokens": -5, "completion_tokens": 1}}'
    )
    reply = read_reply(body)
    assert reply == Reply("x", cut=True, candidates={"M": -1.0}, usage=None)


def test_only_whole_replies_are_found_again(tmp_path):
    log = ReplyLog(tmp_path / "l.jsonl")
    whole = '{"choices": [{"message": {"content": "%s"}}]}'
    for status, body in ((500, whole % "no"), (200, whole % "a"), (200, "{"), (200, whole % "b")):
        log.append({"key": "k", "status": status, "body": body})
    assert [reply.text for reply in log.replies("k")] == ["a", "b"]
    assert log.replies("other") == []
