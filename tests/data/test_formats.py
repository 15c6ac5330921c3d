import json

import pytest

from dominie.core.errors import InputError
from dominie.data.formats import parsed_row

HI = {"role": "user", "content": "hi"}
HELLO = {"role": "assistant", "content": "hello"}
TOOL = {"type": "function", "function": {"name": "stock", "parameters": {"type": "object"}}}


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [HI, HELLO]},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "hi"}]}, HELLO]},
        {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "hello"}]},
        {"conversations": [{"from": "user", "value": "hi"}, {"from": "model", "value": "hello"}]},
        {"conversations": [HI, HELLO]},
        {"instruction": "hi", "input": "", "output": "hello"},
        {"instruction": "hi", "output": "hello"},
        {"instruction": "", "input": "hi", "output": "hello"},
        {"prompt": "hi", "completion": "hello"},
        {"prompt": [HI], "completion": [HELLO]},
        {"prompt": [HI], "completion": "hello"},
        {"messages": [HI, HELLO], "prompt": "unused beside messages", "completion": None},
    ],
)
def test_every_format_gives_the_same_conversation(row):
    parsed = parsed_row(row, "x:1")
    assert parsed.messages == [HI, HELLO]
    assert parsed.tools is None


def test_an_alpaca_input_follows_its_instruction():
    row = {"instruction": "Add.", "input": "1 and 2", "output": "3"}
    assert parsed_row(row, "x:1").messages[0]["content"] == "Add.\n\n1 and 2"


def test_contents_are_kept_to_the_letter():
    row = {"messages": [{"role": "user", "content": "  hi \n"}, HELLO]}
    assert parsed_row(row, "x:1").messages[0]["content"] == "  hi \n"


def test_scalar_columns_become_fields_and_nulls_do_not():
    row = {"messages": [HI, HELLO], "family": "copy", "n": 3, "x": None, "nested": {"a": 1}}
    assert parsed_row(row, "x:1").fields == {"family": "copy", "n": 3}


@pytest.mark.parametrize("tools", [[TOOL], json.dumps([TOOL])])
def test_tools_are_a_list_or_its_json(tools):
    assert parsed_row({"messages": [HI, HELLO], "tools": tools}, "x:1").tools == [TOOL]


@pytest.mark.parametrize("tools", [[], "", "[]", None])
def test_no_tools_are_none(tools):
    assert parsed_row({"messages": [HI, HELLO], "tools": tools}, "x:1").tools is None


def test_tool_calls_and_their_answers_are_kept():
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "stock"}}]}
    answer = {"role": "tool", "name": "stock", "tool_call_id": "1", "content": "4"}
    messages = parsed_row({"messages": [HI, call, answer, HELLO]}, "x:1").messages
    assert messages == [HI, {**call, "content": ""}, answer, HELLO]


def test_sharegpt_function_calls_become_tool_calls():
    call = {"name": "stock", "arguments": {"id": 7}}
    row = {
        "conversations": [
            {"from": "human", "value": "hi"},
            {"from": "function_call", "value": json.dumps(call)},
            {"from": "observation", "value": "4"},
            {"from": "gpt", "value": "hello"},
        ]
    }
    messages = parsed_row(row, "x:1").messages
    assert [m["role"] for m in messages] == ["user", "assistant", "tool", "assistant"]
    assert messages[1]["tool_calls"] == [{"type": "function", "function": call}]


def test_a_system_column_opens_the_conversation_unless_it_has_its_own():
    system = {"role": "system", "content": "Be brief."}
    row = {"instruction": "hi", "output": "hello", "system": "Be brief."}
    assert parsed_row(row, "x:1").messages == [system, HI, HELLO]
    row = {"messages": [system, HI, HELLO], "system": "Be long."}
    assert parsed_row(row, "x:1").messages == [system, HI, HELLO]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ([1], "the row is of the wrong type"),
        ("text", "the row is of the wrong type"),
        ({}, "no known format"),
        ({"text": "hi"}, "no known format"),
        ({"prompt": "hi"}, "a prompt and no answer"),
        ({"prompt": "hi", "completion": None}, "a prompt and no answer"),
        ({"instruction": "hi", "input": ""}, "a prompt and no answer"),
        ({"messages": "hi"}, "`messages` is of the wrong type"),
        ({"messages": []}, "no message"),
        ({"messages": ["hi"]}, "message 1 is of the wrong type"),
        ({"messages": [{"content": "hi"}]}, "message 1 has no role"),
        ({"messages": [{"role": "human", "content": "hi"}]}, "message 1 has an unknown role"),
        ({"messages": [{"role": ["user"], "content": "hi"}]}, "message 1 has an unknown role"),
        ({"conversations": [{"from": "alien", "value": "hi"}]}, "message 1 has an unknown role"),
        ({"messages": [HI, {"role": "assistant"}]}, "the content of message 2 is missing"),
        ({"messages": [{"role": "user", "content": 3}, HELLO]}, "content of message 1 is of the"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image"}]}, HELLO]},
            "content of message 1 is of the wrong type",
        ),
        ({"messages": [HI]}, "no assistant turn"),
        ({"conversations": [{"from": "human", "value": "hi"}]}, "no assistant turn"),
        ({"prompt": "hi", "completion": [HI]}, "no assistant turn"),
        ({"prompt": " ", "completion": "hello"}, "the prompt is empty"),
        ({"instruction": "", "output": "hello"}, "the prompt is empty"),
        ({"prompt": 3, "completion": "hello"}, "`prompt` is of the wrong type"),
        ({"instruction": "hi", "output": 3}, "`output` is of the wrong type"),
        ({"instruction": "hi", "output": " \n"}, "an assistant turn is empty"),
        ({"messages": [HI, {**HELLO, "content": ""}]}, "an assistant turn is empty"),
        (
            {"messages": [HI, {**HELLO, "content": "", "tool_calls": []}]},
            "an assistant turn is empty",
        ),
        ({"messages": [HI, {**HELLO, "tool_calls": "x"}]}, "`tool_calls` of message 2 is of the"),
        ({"messages": [HI, HELLO], "tools": "stock"}, "`tools` is of the wrong type"),
        ({"messages": [HI, HELLO], "tools": ["stock"]}, "`tools` is of the wrong type"),
        ({"messages": [HI, HELLO], "system": 3}, "`system` is of the wrong type"),
        ({"messages": [HI, {**HELLO, "content": "\ud83d"}]}, "half of a surrogate pair"),
        ({"messages": [HI, {**HELLO, "name": "\ude00"}]}, "half of a surrogate pair"),
        ({"messages": [HI, HELLO], "tools": [{"name": "\ud83d"}]}, "half of a surrogate pair"),
        (
            {"conversations": [{"from": "function_call", "value": "stock(7)"}]},
            "the function call of message 1 is of the wrong type",
        ),
    ],
)
def test_bad_rows_are_refused_by_name(row, message):
    with pytest.raises(InputError) as caught:
        parsed_row(row, "data/x.jsonl:17")
    assert message in caught.value.what
    assert caught.value.where == "data/x.jsonl:17"
    assert caught.value.expected or caught.value.found


def test_long_values_are_shown_in_part():
    with pytest.raises(InputError) as caught:
        parsed_row({"messages": "x" * 10_000}, "x:1")
    assert len(caught.value.found) < 120


def test_a_message_of_one_layout_with_a_key_of_the_other_keeps_its_own():
    said = {"from": "gpt", "value": "hi", "content": [], "name": "anna"}
    row = {"conversations": [{"from": "human", "value": "hello"}, said]}
    assert parsed_row(row, "x:1").messages[1] == {
        "role": "assistant",
        "content": "hi",
        "name": "anna",
    }


@pytest.mark.parametrize(
    ("row", "do"),
    [
        (
            {"Question": "hi", "id": 3, "answer": "ho"},
            "rename its columns: `Question` to `prompt`, `answer` to `completion`",
        ),
        ({"prompt;completion": "hi;ho"}, "its columns are separated by semicolons"),
        ({"foo": 1, "answer": "ho"}, None),
    ],
)
def test_columns_by_other_names_are_told_how_to_be_called(row, do):
    with pytest.raises(InputError) as refused:
        parsed_row(row, "d.jsonl:1")
    assert (refused.value.do or "").startswith(do or "")
    assert (refused.value.do is None) == (do is None)


def test_calls_and_results_in_the_older_form_are_read():
    call = {"name": "count", "arguments": '{"of": "a"}'}
    row = {
        "messages": [
            {"role": "user", "content": "how many?"},
            {"role": "assistant", "content": None, "function_call": call},
            {"role": "function", "name": "count", "content": "4"},
            {"role": "assistant", "content": "Four."},
        ]
    }
    _, called, told, _ = parsed_row(row, "x:1").messages
    assert called["tool_calls"] == [{"type": "function", "function": call}]
    assert told["role"] == "tool"


@pytest.mark.parametrize(
    ("row", "do"),
    [
        ({"conversation": [{"role": "user", "content": "a"}]}, "`conversation` to `messages`"),
        ({"dialog": [{"from": "human", "value": "a"}]}, "`dialog` to `conversations`"),
        ({"messages": [{"role": "User", "content": "a"}]}, "write it as user"),
        ({"messages": [{"from": "gpt", "value": "a"}]}, "write it as assistant"),
        ({"messages": [{"role": "developer", "content": "a"}]}, "write it as system"),
    ],
)
def test_what_to_do_about_other_names_is_said(row, do):
    with pytest.raises(InputError) as caught:
        parsed_row(row, "x:1")
    assert do in str(caught.value.do)
