"""Columns beside a conversation: honoured, refused or named, and never lost without a word."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dominie.core.errors import InputError
from dominie.data.batch import collate
from dominie.data.conversations import read_conversations
from dominie.data.formats import parsed_row
from dominie.data.rows import prepare
from dominie.data.sources import Source
from dominie.data.tokenization import encode, supervised_spans

HI = {"role": "user", "content": "hi"}
HELLO = {"role": "assistant", "content": "hello"}
ALPACA = {"instruction": "and now?", "output": "later"}


def texts(row):
    return [(m["role"][0], m["content"]) for m in parsed_row(row, "x:1").messages]


def refusal(row):
    with pytest.raises(InputError) as caught:
        parsed_row(row, "x:1")
    return caught.value


# Parts of a conversation


@pytest.mark.parametrize(
    "turns",
    [
        [["hi", "hello"]],
        json.dumps([["hi", "hello"]]),
        "[('hi', 'hello')]",
        [{"user": "hi", "assistant": "hello"}],
        [{"question": "hi", "answer": "hello"}],
        [HI, HELLO],
        [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "hello"}],
    ],
)
@pytest.mark.parametrize("name", ["history", "chat_history"])
@pytest.mark.parametrize("row", [ALPACA, {"prompt": "and now?", "completion": "later"}])
def test_earlier_turns_come_first(row, name, turns):
    told = [("u", "hi"), ("a", "hello"), ("u", "and now?"), ("a", "later")]
    assert texts({**row, name: turns}) == told
    parsed = parsed_row({**row, name: turns}, "x:1")
    assert parsed.fields == {}
    assert parsed.unread == ()


@pytest.mark.parametrize("turns", [[], "", None, "[]"])
def test_no_earlier_turns_are_none(turns):
    assert texts({**ALPACA, "history": turns}) == [("u", "and now?"), ("a", "later")]


@pytest.mark.parametrize("turns", ["User: hi", ["hi", "hello"], [["hi", None]], [["hi"]], {"a": 1}])
def test_earlier_turns_of_another_layout_are_refused(turns):
    assert "`history` is of the wrong type" in refusal({**ALPACA, "history": turns}).what


def test_earlier_turns_beside_messages_are_refused():
    for row in ({"messages": [HI, HELLO]}, {"prompt": [HI], "completion": "hello"}):
        assert "earlier turns in `history`" in refusal({**row, "history": [["a", "b"]]}).what


@pytest.mark.parametrize("name", ["system", "system_prompt", "system_message"])
def test_a_system_prompt_opens_every_format(name):
    for row in (ALPACA, {"prompt": [HI], "completion": "hello"}, {"messages": [HI, HELLO]}):
        assert texts({**row, name: "Be brief."})[0] == ("s", "Be brief.")
        assert parsed_row({**row, name: "Be brief."}, "x:1").fields == {}


def test_two_system_prompts_are_refused_or_named():
    row = {**ALPACA, "system": "Be brief.", "system_prompt": "Be long."}
    assert "two system prompts" in refusal(row).what
    assert texts({**row, "system_prompt": "Be brief."})[0] == ("s", "Be brief.")
    own = {"messages": [{"role": "system", "content": "Be brief."}, HI, HELLO]}
    assert parsed_row({**own, "system": "Be brief."}, "x:1").unread == ()
    assert parsed_row({**own, "system": "Be long."}, "x:1").unread == (
        "system beside a system message",
    )


@pytest.mark.parametrize("context", ["It opened in 1998.", ["It opened", "in 1998."]])
def test_a_context_follows_the_question(context):
    joined = context if isinstance(context, str) else "It opened\n\nin 1998."
    for row in ({"instruction": "When?", "output": "1998"}, {"prompt": "When?", "completion": "x"}):
        assert texts({**row, "context": context})[0] == ("u", f"When?\n\n{joined}")
    within = parsed_row({"prompt": f"{joined} When?", "completion": "x", "context": context}, "")
    assert within.messages[0]["content"] == f"{joined} When?"
    assert within.fields == {"context": context} or isinstance(context, list)
    assert "`context` is of the wrong type" in refusal({**ALPACA, "context": {"a": 1}}).what


# Weights


@pytest.mark.parametrize(
    "mark",
    [{"weight": 0}, {"train": False}, {"loss": False}, {"loss_weight": 0.0}, {"train_on_turn": 0}],
)
@pytest.mark.parametrize("sharegpt", [False, True])
def test_a_message_of_weight_0_is_not_trained_on(make_tokenizer, mark, sharegpt):
    tokenizer = make_tokenizer("chatml")
    messages = [HI, {**HELLO, **mark}, {"role": "user", "content": "bye"}, HELLO]
    row = {"messages": messages}
    if sharegpt:
        names = {"user": "human", "assistant": "gpt"}
        row = {
            "conversations": [
                {"from": names[m["role"]], "value": m["content"]}
                | {k: v for k, v in m.items() if k not in m.keys() & HI.keys()}
                for m in messages
            ]
        }
    parsed = parsed_row(row, "x:1")
    assert all(message.keys() == HI.keys() for message in parsed.messages)
    encoded = encode(tokenizer, parsed)
    learnt = [t for t, on in zip(encoded.input_ids, encoded.supervised, strict=True) if on]
    assert tokenizer.decode(learnt) == "hello<|im_end|>"
    assert encoded.supervised.index(True) > len(encoded.supervised) // 2
    assert encoded.weights is None
    if not sharegpt:
        text, spans = supervised_spans(tokenizer, row["messages"])
        assert [text[slice(*span)] for span in spans] == ["hello<|im_end|>"]


def test_fractions_weigh_the_tokens_of_their_turn(make_tokenizer, tmp_path):
    tokenizer = make_tokenizer("chatml")
    rows = [{"messages": [HI, {**HELLO, "weight": 0.25}, HI, HELLO]}, {"messages": [HI, HELLO]}]
    path = tmp_path / "x.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    source = Source(name="x", path=str(path))
    made = prepare({"x": source}, tokenizer, max_length=64, cache=tmp_path / "rows")["x"].train
    weighted = made[0].weights[made[0].supervised].tolist()
    assert weighted == [0.25] * (len(weighted) // 2) + [1.0] * (len(weighted) // 2)
    assert (made[0].weights[~made[0].supervised] == 1).all()
    assert made[1].weights is None
    batch = collate([(0, made[0]), (1, made[1])])
    assert set(batch.weights[batch.supervised].tolist()) == {0.25, 1.0}


def test_rows_that_differ_in_weight_are_no_duplicates(make_tokenizer, tmp_path):
    rows = [{"messages": [HI, {**HELLO, "weight": w}, HI, HELLO]} for w in (1, 0, 0)]
    path = tmp_path / "x.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    source = Source(name="x", path=str(path))
    summary = prepare({"x": source}, make_tokenizer("chatml"), max_length=64, cache=tmp_path / "r")[
        "x"
    ].summary
    assert (summary.kept, summary.removed_duplicates) == (2, 1)


@pytest.mark.parametrize(
    ("mark", "what"),
    [
        ({"weight": -1}, "`weight` of message 2 is of the wrong type"),
        ({"weight": float("nan")}, "`weight` of message 2 is of the wrong type"),
        ({"weight": "0"}, "`weight` of message 2 is of the wrong type"),
        ({"loss": 2.31}, "`loss` of message 2 is of the wrong type"),
        ({"weight": 1, "train": False}, "the weights of message 2 contradict each other"),
        ({"mask": True}, "`mask` of message 2 cannot be honoured"),
        ({"skip": True}, "`skip` of message 2 cannot be honoured"),
        ({"learn": False}, "every assistant turn has the weight 0"),
        ({"train_detail": [{"begin_offset": 0}]}, "`train_detail` of message 2 cannot"),
        ({"weight": 0}, "every assistant turn has the weight 0"),
    ],
)
def test_weights_that_cannot_be_honoured_are_refused(mark, what):
    assert what in refusal({"messages": [HI, {**HELLO, **mark}]}).what


def test_a_question_that_is_to_be_trained_on_is_named():
    parsed = parsed_row({"messages": [{**HI, "train": True}, HELLO]}, "x:1")
    assert parsed.unread == ("weight of user messages",)
    assert parsed.weights == ()


def test_fields_are_counted_whatever_they_hold(tmp_path, make_tokenizer):
    path = tmp_path / "x.jsonl"
    found = ["a" * 9, 3, 0.5, ["b", 1], "c"]
    path.write_text("".join(json.dumps({**ALPACA, "note": n, "id": str(n)}) + "\n" for n in found))
    source = Source(name="x", path=str(path))
    made = prepare({"x": source}, make_tokenizer("chatml"), max_length=64, cache=tmp_path / "r")
    assert made["x"].summary.beside["note"] == made["x"].summary.kept


# Answers that are not to be learnt


@pytest.mark.parametrize(
    "mark",
    [{"label": False}, {"kto_tag": 0}, {"label": "False"}, {"weight": 0.0}, {"is_correct": False}],
)
def test_an_answer_called_bad_is_refused_or_passed_over(tmp_path, mark):
    ((name, value),) = mark.items()
    rows = [{"prompt": "a", "completion": "b", name: v} for v in (True, value)]
    path = tmp_path / "x.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(InputError, match=f"not to be learnt: `{name}` is (false|0)") as caught:
        list(read_conversations(Source(name="x", path=str(path))))
    assert caught.value.where == f"{path}:2"
    chosen = read_conversations(Source(name="x", path=str(path), where={name: True}))
    assert [c.fields[name] for c in chosen] == [True]


def test_other_labels_are_fields():
    for label in (0, 1, True, "negative"):
        assert parsed_row({**ALPACA, "label": label}, "").fields == {"label": label}


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "a", "chosen": "b", "rejected": "c"},
        {"instruction": "a", "input": "", "chosen": "b", "rejected": "c"},
        {"messages": [HI], "chosen": HELLO, "rejected": HELLO},
        {"messages": [HI, HELLO, HI], "chosen": HELLO, "rejected": HELLO},
        {"input": {"messages": [HI]}, "preferred_output": [HELLO], "non_preferred_output": [HELLO]},
    ],
)
def test_preferences_are_no_answers(row):
    error = refusal(row)
    assert "preferences" in error.what
    assert "`completion`" in error.do


# Names


@pytest.mark.parametrize(
    ("columns", "advice"),
    [
        (
            "instruction context response category",
            "rename its columns: `response` to `output`; read as it is: `instruction`, `context`; "
            "not trained on: `category`; join to one of these what is part of a conversation",
        ),
        (
            "system_prompt question response",
            "rename its columns: `question` to `prompt`, `response` to `completion`; read as it "
            "is: `system_prompt`",
        ),
        (
            "instruction input response",
            "rename its columns: `response` to `output`; read as it is: `instruction`, `input`",
        ),
        (
            "sys question passage answer",
            "rename its columns: `question` to `prompt`, `answer` to `completion`, `passage` to "
            "`context`, `sys` to `system`",
        ),
        (
            "prompt response",
            "rename its columns: `response` to `completion`; read as it is: `prompt`",
        ),
        (
            "_prompt _response _system",
            "rename its columns: `_prompt` to `prompt`, `_response` to `completion`, `_system` to "
            "`system`",
        ),
    ],
)
def test_advice_to_rename_leaves_no_column_out(columns, advice):
    names = columns.split()
    assert refusal(dict.fromkeys(names, "x")).do == advice
    assert all(f"`{name}`" in advice for name in names)


def test_a_source_says_which_columns_go_nowhere(make_tokenizer, tmp_path):
    rows = [{**ALPACA, "output": str(i), "id": i, "meta": {"a": 1} if i else {}} for i in range(3)]
    path = tmp_path / "x.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    source = Source(name="x", path=str(path))
    summary = prepare({"x": source}, make_tokenizer("chatml"), max_length=64, cache=tmp_path / "r")[
        "x"
    ].summary
    assert summary.columns_line("x") == (
        "x: columns not trained on, for tasks and `where` alone: id; read by nothing: meta (2 rows)"
    )


# A name twice


@pytest.mark.parametrize(
    ("name", "text", "place"),
    [
        ("x.jsonl", '{"prompt":"a","prompt":"b","completion":"c"}', ":1"),
        ("x.json", '[\n{"prompt":"a","completion":"c","prompt":"b"}]', ":2"),
        ("x.jsonl", '{"messages":[{"role":"user","content":"a","content":"b"}]}', ":1"),
        ("x.csv", "prompt,completion,prompt\na,b,c", ""),
    ],
)
def test_a_name_that_stands_twice_is_refused(tmp_path, name, text, place):
    path = tmp_path / name
    path.write_text(text)
    with pytest.raises(InputError) as caught:
        list(read_conversations(Source(name="x", path=str(path))))
    assert caught.value.where == f"{path}{place}"
    assert "twice" in caught.value.found or "2 times" in caught.value.found


def test_a_parquet_column_that_stands_twice_is_refused(tmp_path):
    words = [pa.array(["a"]), pa.array(["b"]), pa.array(["c"])]
    message = pa.StructArray.from_arrays(words, names=["role", "content", "content"])
    messages = pa.ListArray.from_arrays(pa.array([0, 1], pa.int32()), message)
    for columns, names in ((words, ["prompt", "prompt", "completion"]), ([messages], ["messages"])):
        pq.write_table(pa.Table.from_arrays(columns, names=names), tmp_path / "x.parquet")
        with pytest.raises(InputError, match="two columns have the same name"):
            list(read_conversations(Source(name="x", path=str(tmp_path / "x.parquet"))))


# Keys of messages


def test_keys_of_messages_that_the_template_does_not_name_are_told(make_tokenizer, tmp_path):
    named = {**HI, "name": "Ann", "mood": 3}
    call = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "a"}}]}
    rows = [
        {"messages": [named, HELLO]},
        {"messages": [HI, call, {"role": "tool", "content": "4", "tool_call_id": "x"}, HELLO]},
    ]
    path = tmp_path / "x.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    tokenizer = make_tokenizer("chatml")
    source = {"x": Source(name="x", path=str(path))}
    summary = prepare(source, tokenizer, max_length=99, cache=tmp_path / "r")["x"].summary
    told = [(lost.what, lost.first) for lost in summary.left_out]
    assert told == [(f"the key `{k}` of messages", "x.jsonl:1") for k in ("name", "mood")]
    tokenizer.chat_template += "{# message.name #}"
    summary = prepare(source, tokenizer, max_length=99, cache=tmp_path / "r")["x"].summary
    assert [lost.what for lost in summary.left_out] == ["the key `mood` of messages"]


def test_a_conversation_of_endless_turns_is_refused_at_once(make_tokenizer):
    endless = parsed_row({"messages": [HI, HELLO] * 10_000}, "x:1")
    with pytest.raises(InputError, match="too many messages") as caught:
        encode(make_tokenizer("chatml"), endless)
    assert caught.value.where == "x:1"
