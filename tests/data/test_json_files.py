import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dominie.core.errors import InputError
from dominie.data import json_files as module
from dominie.data.json_files import json_rows, jsonl_rows

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=12),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3)
    ),
    max_leaves=8,
)
OBJECTS = st.dictionaries(st.text(max_size=4), VALUES, max_size=4)


@settings(max_examples=60, deadline=None)
@given(
    rows=st.lists(OBJECTS, max_size=5),
    indent=st.sampled_from([None, 0, 7]),
    ascii_only=st.booleans(),
)
def test_an_array_is_read_as_it_was_written(tmp_path_factory, rows, indent, ascii_only):
    path = tmp_path_factory.mktemp("json") / "rows.json"
    path.write_text(json.dumps(rows, indent=indent, ensure_ascii=ascii_only), encoding="utf-8")
    assert [row for _, row in json_rows(path)] == rows


def test_line_numbers_are_where_a_row_begins(tmp_path):
    path = tmp_path / "rows.json"
    path.write_text('\n[\n {"a":\n 1},\n\n {"a": "x\\ny"}, {"a": 3}\n]\n')
    assert [line for line, _ in json_rows(path)] == [3, 6, 6]


def test_objects_one_after_another_are_read_without_an_array(tmp_path):
    path = tmp_path / "rows.json"
    path.write_text('{"a": 1}\n{"a":\n2}{"a": 3}')
    assert list(json_rows(path)) == [(1, {"a": 1}), (2, {"a": 2}), (3, {"a": 3})]


def test_a_byte_order_mark_is_no_text(tmp_path):
    path = tmp_path / "rows.json"
    path.write_text('{"a": 1}', encoding="utf-8-sig")
    assert list(json_rows(path)) == list(jsonl_rows(path)) == [(1, {"a": 1})]


@pytest.mark.parametrize(
    ("text", "line", "message"),
    [
        ('[{"a": 1},\n{"a": 1,,}]', 2, "malformed JSON"),
        ('[{"a": 1},\n{"a":\ntrue\n"b"}]', 4, "malformed JSON"),
        ('[{"a": 1}\n{"a": 1}]', 2, "malformed JSON"),
        ('[{"a": 1},\n]', 2, "not a JSON object"),
        ("[\n1]", 2, "not a JSON object"),
        ('[{"a": 1}', 1, "broken off"),
        ('[{"a": 1},\n', 2, "not a JSON object"),
        ('[{"a": 1}]\n[]', 2, "more after the end"),
        ('[]\n{"a": 1}', 2, "more after the end"),
        ('{"a": 1}\n{"a": "never closed', 2, "malformed JSON"),
        ('{"a": 1}\nplain text', 2, "not a JSON object"),
    ],
)
def test_what_is_malformed_is_named_by_its_line(tmp_path, text, line, message):
    path = tmp_path / "rows.json"
    path.write_text(text)
    *_, (_, error) = json_rows(path)
    assert isinstance(error, InputError)
    assert message in error.what
    assert error.where == f"{path}:{line}"
    assert error.expected
    assert error.found


@pytest.mark.parametrize("read", [json_rows, jsonl_rows])
@pytest.mark.parametrize(
    ("value", "found"),
    [("1" + "0" * 5000, "4300 digits"), ("[" * 200_000, "nested too deeply")],
    ids=["digits", "brackets"],
)
def test_numbers_and_brackets_beyond_all_measure_are_malformed(tmp_path, read, value, found):
    path = tmp_path / "rows"
    path.write_text(f'{{"a": {value}}}')
    [(_, error)] = read(path)
    assert "malformed JSON" in error.what
    assert found in error.found


def test_bytes_that_are_no_text_are_named_by_their_line(tmp_path):
    path = tmp_path / "rows.json"
    path.write_bytes(b'[{"a": 1},\n\n{"a": "\xff"}]')
    *_, (_, error) = json_rows(path)
    assert "not UTF-8" in error.what
    assert error.where == f"{path}:3"
    assert "0xff" in error.found


def test_reading_lines_goes_on_after_a_bad_one(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"a": 1}\n\n{"a": \n"\xe9"\n{"a": 2}')
    rows = list(jsonl_rows(path))
    assert [line for line, _ in rows] == [1, 3, 4, 5]
    assert "malformed JSON" in rows[1][1].what
    assert "not UTF-8" in rows[2][1].what
    assert "byte 2 of the line" in rows[2][1].found
    assert rows[3][1] == {"a": 2}


def test_a_row_without_an_end_is_not_read_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "MAX_ROW_BYTES", 1000)
    path = tmp_path / "rows.jsonl"
    path.write_text('{"a": 1}\n{"a": "' + "x" * 100_000)
    rows = list(jsonl_rows(path))
    assert "a row is too large" in rows[-1][1].what
    assert rows[-1][1].where == f"{path}:2"


def test_a_json_file_that_is_too_large_is_not_read(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "MAX_JSON_BYTES", 3 * 2**20)
    path = tmp_path / "rows.json"
    with path.open("wb") as file:
        file.truncate(3 * 2**20 + 1)
    [(_, error)] = json_rows(path)
    assert error.what == "the file is too large"
    assert error.where == str(path)
    assert error.expected == "a JSON file of at most 3 MiB"
    assert "JSON Lines" in error.do
