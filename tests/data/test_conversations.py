import json
import sys
import types

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dominie.core.errors import InputError
from dominie.data.conversations import Conversation, read_conversations
from dominie.data.sources import Source

HI = {"role": "user", "content": "hi"}
HELLO = {"role": "assistant", "content": "hello"}


def read(path):
    return list(read_conversations(Source(name="x", path=str(path))))


def row(number):
    return {"prompt": f"question {number}", "completion": f"answer {number}", "family": "sums"}


def conversation(number, where):
    return Conversation(
        [
            {"role": "user", "content": f"question {number}"},
            {"role": "assistant", "content": f"answer {number}"},
        ],
        None,
        where,
        {"family": "sums"},
    )


def test_json_lines_say_where_they_stand(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text(json.dumps(row(1)) + "\n\n" + json.dumps(row(2)))
    assert read(path) == [conversation(1, f"{path}:1"), conversation(2, f"{path}:3")]


def test_json_arrays_say_where_they_stand(tmp_path):
    path = tmp_path / "x.json"
    path.write_text(json.dumps([row(1), row(2)], indent=1))
    assert read(path) == [conversation(1, f"{path}:2"), conversation(2, f"{path}:7")]


def test_parquet_says_which_row(tmp_path):
    path = tmp_path / "x.parquet"
    pq.write_table(pa.Table.from_pylist([row(i) for i in range(1, 1201)]), path, row_group_size=500)
    read_back = read(path)
    assert len(read_back) == 1200
    assert read_back[-1] == conversation(1200, f"{path}, row 1200")


def test_parquet_gives_no_message_the_keys_of_others(tmp_path):
    path = tmp_path / "x.parquet"
    calls = [
        {"function": {"name": "a", "arguments": {"x": 1}}},
        {"function": {"name": "b", "arguments": {"y": 2}}},
    ]
    messages = [HI, {"role": "assistant", "content": "", "tool_calls": calls}]
    pq.write_table(pa.Table.from_pylist([{"messages": messages}]), path)
    assert read(path)[0].messages == messages


def test_a_folder_is_read_in_the_order_of_its_files(tmp_path):
    (tmp_path / "b.jsonl").write_text(json.dumps(row(2)))
    (tmp_path / "a.json").write_text(json.dumps([row(1)]))
    assert [c.messages[0]["content"] for c in read(tmp_path)] == ["question 1", "question 2"]


def test_reading_is_lazy(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text(json.dumps(row(1)) + "\nnot JSON\n")
    rows = read_conversations(Source(name="x", path=str(path)))
    assert next(rows) == conversation(1, f"{path}:1")
    with pytest.raises(InputError, match="malformed JSON"):
        next(rows)


@pytest.mark.parametrize("suffix", ["json", "jsonl", "parquet"])
@pytest.mark.parametrize("junk", [b"", b"\x00\x9f\x92\x96" * 50, b"PAR1PAR1", b"\n\n", b"\x1f\x8b"])
def test_files_without_conversations_are_one_error(tmp_path, suffix, junk):
    path = tmp_path / f"x.{suffix}"
    path.write_bytes(junk)
    with pytest.raises(InputError) as caught:
        read(path)
    assert str(path) in caught.value.where


def test_an_empty_array_is_an_empty_file(tmp_path):
    path = tmp_path / "x.json"
    path.write_text("[]")
    with pytest.raises(InputError, match="the file is empty"):
        read(path)


def test_an_unreadable_file_is_an_error(tmp_path, monkeypatch):
    path = tmp_path / "x.jsonl"
    path.write_text(json.dumps(row(1)))

    def refuse(*args, **kwargs):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(type(path), "open", refuse)
    with pytest.raises(InputError, match="cannot be read") as caught:
        read(path)
    assert caught.value.found == "Permission denied"


def test_the_bad_rows_that_follow_are_named_too(tmp_path):
    path = tmp_path / "x.jsonl"
    lines = [json.dumps(row(i)) for i in range(20)]
    lines[3], lines[7] = '{"prompt": "alone"}', "nonsense"
    path.write_text("\n".join(lines))
    with pytest.raises(InputError) as caught:
        read(path)
    assert caught.value.where == f"{path}:4"
    assert caught.value.what == "the row has a prompt and no answer"
    assert f"{path}:8 (malformed JSON)" in caught.value.do
    assert "and more" not in caught.value.do


def test_a_file_of_bad_rows_names_the_first_few(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text("nonsense\n" * 1000)
    with pytest.raises(InputError) as caught:
        read(path)
    assert caught.value.do.count("x.jsonl:") == 4
    assert caught.value.do.endswith("and more")


def test_hub_data_is_streamed(monkeypatch):
    calls = []

    def load_dataset(path, subset, **options):
        calls.append((path, subset, options))
        return iter([row(1), row(2)])

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    source = Source(name="x", path="org/chats", subset="en", split="train_sft")
    found = list(read_conversations(source))
    assert found[1] == conversation(2, "org/chats[train_sft], row 2")
    assert calls == [("org/chats", "en", {"split": "train_sft", "streaming": True})]


def test_a_hub_that_cannot_be_reached_is_one_error(monkeypatch):
    def load_dataset(path, subset, **options):
        raise ConnectionError("Couldn't reach 'org/chats' on the Hub\nlong traceback")

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    with pytest.raises(InputError, match="neither a file here nor a hub data set") as caught:
        read("org/chats")
    assert "org/chats" in caught.value.where
    assert caught.value.found == "ConnectionError: Couldn't reach 'org/chats' on the Hub"


MESSAGE = st.fixed_dictionaries(
    {},
    optional={
        "role": st.sampled_from(["user", "assistant", "system", "tool", "robot", None, 3]),
        "content": st.text(max_size=4) | st.none() | st.lists(st.text(max_size=2), max_size=2),
        "tool_calls": st.none() | st.lists(st.dictionaries(st.text(max_size=2), st.none())),
        "from": st.sampled_from(["human", "gpt", "function_call"]),
        "value": st.text(max_size=4),
    },
)
ROW = st.none() | st.fixed_dictionaries(
    {},
    optional={
        "messages": st.lists(MESSAGE, max_size=4) | st.text(max_size=3),
        "conversations": st.lists(MESSAGE | st.integers(), max_size=3),
        "prompt": st.text(max_size=3) | st.lists(MESSAGE, max_size=2),
        "completion": st.text(max_size=3) | st.lists(MESSAGE, max_size=2) | st.integers(),
        "tools": st.text(max_size=3) | st.lists(st.integers(), max_size=2),
        "system": st.text(max_size=2) | st.booleans(),
    },
)


@settings(max_examples=150, deadline=None)
@given(rows=st.lists(ROW, max_size=4), array=st.booleans())
def test_any_rows_are_conversations_or_an_input_error(tmp_path_factory, rows, array):
    path = tmp_path_factory.mktemp("rows") / ("x.json" if array else "x.jsonl")
    text = json.dumps(rows) if array else "\n".join(map(json.dumps, rows))
    path.write_text(text)
    try:
        found = read(path)
    except InputError:
        return
    assert len(found) == len(rows)
    for item in found:
        assert "assistant" in {message["role"] for message in item.messages}
        assert all(isinstance(message["content"], str) for message in item.messages)


@settings(max_examples=100, deadline=None)
@given(data=st.binary(max_size=60), suffix=st.sampled_from(["json", "jsonl", "parquet"]))
def test_any_bytes_are_an_input_error(tmp_path_factory, data, suffix):
    path = tmp_path_factory.mktemp("bytes") / f"x.{suffix}"
    path.write_bytes(data)
    with pytest.raises(InputError) as caught:
        read(path)
    assert str(path) in caught.value.where


def test_nulls_within_calls_mean_the_same_in_every_format(tmp_path):
    """datasets writes a null for every key that another row has; a text of JSON is left alone."""
    text = '{"x": null}'
    calls = [
        {"function": {"name": "a", "arguments": {"x": 1}}},
        {"function": {"name": "b", "arguments": {"y": 2}}},
        {"function": {"name": "c", "arguments": text}},
    ]
    padded = [{"x": 1, "y": None}, {"x": None, "y": 2}, text]
    given = [
        {"function": {**call["function"], "arguments": arguments}}
        for call, arguments in zip(calls, padded, strict=True)
    ]
    answer = {"role": "assistant", "content": "", "tool_calls": given, "name": None}
    (tmp_path / "x.jsonl").write_text(json.dumps({"messages": [HI, answer]}))
    (found,) = read(tmp_path / "x.jsonl")
    assert found.messages == [HI, {"role": "assistant", "content": "", "tool_calls": calls}]
    assert found.unread == ("null in tools or tool calls",)
    answer["tool_calls"] = calls
    (tmp_path / "x.jsonl").write_text(json.dumps({"messages": [HI, answer]}))
    assert read(tmp_path / "x.jsonl")[0].unread == ()


def repeated(value, count):
    """A column that a Parquet file holds in a few bytes."""
    return pa.DictionaryArray.from_arrays(pa.array(np.zeros(count, np.int32)), pa.array([value]))


def test_a_small_file_of_endless_rows_is_refused(tmp_path):
    path, count = tmp_path / "x.parquet", 2**23
    column = repeated("hi", count)
    pq.write_table(pa.table({"prompt": column, "completion": column}), path, row_group_size=count)
    assert path.stat().st_size < 100_000
    with pytest.raises(InputError, match="more than a file of its size can hold"):
        read(path)


def test_a_small_file_of_one_endless_list_is_refused(tmp_path):
    path, count = tmp_path / "x.parquet", 2**23
    tags = pa.ListArray.from_arrays(pa.array([0, count], pa.int32()), repeated("z", count))
    pq.write_table(pa.table({"prompt": ["hi"], "completion": ["hello"], "tags": tags}), path)
    with pytest.raises(InputError, match=f"(?s)size can hold.*{count:,} values"):
        read(path)


def test_a_small_file_of_one_endless_text_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("dominie.data.conversations._FEW_BYTES", 2**20)
    path = tmp_path / "x.parquet"
    table = pa.table({"prompt": ["x" * 2**24], "completion": ["hello"]})
    pq.write_table(table, path, compression="zstd", use_dictionary=False, write_statistics=False)
    with pytest.raises(InputError, match="more than a file of its size can hold"):
        read(path)


def test_a_long_text_that_stands_in_many_rows_is_copied_a_few_times_at_once(tmp_path):
    path, size, count = tmp_path / "x.parquet", 2**20, 400
    prompts, answers = repeated("x" * size, count), [str(n) for n in range(count)]
    pq.write_table(pa.table({"prompt": prompts, "completion": answers}), path)
    assert path.stat().st_size < 2 * size
    before = pa.total_allocated_bytes()
    rows = read_conversations(Source(name="x", path=str(path)))
    assert next(rows).answer == "0"
    assert pa.total_allocated_bytes() - before < 64 * size
    assert sum(1 for _ in rows) == count - 1


def test_a_row_of_many_long_texts_is_refused(tmp_path):
    path = tmp_path / "x.parquet"
    texts = pa.ListArray.from_arrays(pa.array([0, 100], pa.int32()), repeated("x" * 2**20, 100))
    pq.write_table(pa.table({"prompt": ["hi"], "completion": ["hello"], "texts": texts}), path)
    with pytest.raises(InputError, match="a row is too large"):
        read(path)
