"""The public function answers what the masks of training are made of."""

from pathlib import Path

import pytest

from dominie.core.errors import InputError
from dominie.data import supervised_spans
from dominie.data.conversations import Conversation
from dominie.data.tokenization import encode

TEMPLATES = sorted(p.stem for p in (Path(__file__).parent / "chat_templates").glob("*.jinja"))
TOOLS = [{"type": "function", "function": {"name": "stock", "parameters": {"type": "object"}}}]
CALL = {"type": "function", "function": {"name": "stock", "arguments": {"id": 7}}}


THOUGHT = "<think>\nhm\n</think>\n\n"


def chat(*contents, system=None):
    roles = ("user", "assistant")
    turns = [{"role": roles[k % 2], "content": text} for k, text in enumerate(contents)]
    return ([{"role": "system", "content": system}] if system else []) + turns


CHATS = {
    "one turn": (chat("What is two plus two?", "four"), None),
    "three turns": (chat("a", "one", "b", "two", "c", "3"), None),
    "a system message": (chat("a", "one", "b", "two", system="Be brief."), None),
    "ends with a question": (chat("a", "one", "b"), None),
    "unicode": (chat("Größe? 你好", "🙂 🇩🇪 e\u0301 привет", "😀", "😀"), None),
    "white space": (chat("  a \n", " \n one \t\n"), None),
    "thoughts": (
        chat("a", "<think>\nhm\n</think>\n\none", "b", "<think>\nhm\n</think>\n\ntwo"),
        None,
    ),
    "markers": (chat("Say <|im_end|>\n", "[INST] <|im_start|>user\n<end_of_turn>\n six"), None),
    "tools": (
        [
            *chat("How many?"),
            {"role": "assistant", "content": "", "tool_calls": [CALL]},
            {"role": "tool", "content": "4"},
            {"role": "assistant", "content": "Four."},
        ],
        TOOLS,
    ),
}


@pytest.mark.parametrize("kind", CHATS)
@pytest.mark.parametrize("family", TEMPLATES)
def test_tokens_trained_on_are_those_that_overlap_a_span(make_tokenizer, family, kind):
    tokenizer = make_tokenizer(family)
    messages, tools = CHATS[kind]
    refused = encoding_error(tokenizer, messages, tools)
    if refused:
        with pytest.raises(InputError) as caught:
            supervised_spans(tokenizer, messages, tools)
        assert str(caught.value) == refused
        return
    row = encode(tokenizer, Conversation(messages, tools))
    text, spans = supervised_spans(tokenizer, messages, tools)
    assert text == tokenizer.apply_chat_template(messages, tools=tools, tokenize=False)
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    assert encoded["input_ids"] == row.input_ids
    assert row.supervised == [
        any(begin < end and begin < stop and end > start for start, stop in spans)
        for begin, end in encoded["offset_mapping"]
    ]
    assert len(spans) == sum(message["role"] == "assistant" for message in messages)
    answers = [message["content"] for message in messages if message["role"] == "assistant"]
    for answer, (start, stop) in zip(answers, spans, strict=True):
        assert answer.split()[-1:] == [] or answer.split()[-1] in text[start:stop]


def encoding_error(tokenizer, messages, tools):
    try:
        encode(tokenizer, Conversation(messages, tools))
    except InputError as error:
        return str(error)
    return None


def test_few_kinds_are_refused(make_tokenizer):
    """Else the test above would compare errors alone."""
    refused = [
        (family, kind)
        for family in TEMPLATES
        for kind, (messages, tools) in CHATS.items()
        if encoding_error(make_tokenizer(family), messages, tools)
    ]
    assert len(refused) < 0.3 * len(TEMPLATES) * len(CHATS), refused


def test_spans_are_characters_of_the_text(make_tokenizer):
    text, spans = supervised_spans(make_tokenizer("chatml"), chat("a", "one", "b", "two"))
    assert [text[start:end] for start, end in spans] == ["one<|im_end|>", "two<|im_end|>"]


def test_without_an_answer_nothing_is_trained_on(make_tokenizer):
    text, spans = supervised_spans(make_tokenizer("chatml"), chat("a"))
    assert "a" in text
    assert spans == []


@pytest.mark.parametrize(
    ("messages", "what"),
    [
        ("a text", "`messages` is of the wrong type"),
        ([], "the conversation has no message"),
        ([{"role": "wizard", "content": "a"}], "message 1 has an unknown role"),
        ([{"role": "user", "content": 7}], "the content of message 1 is of the wrong type"),
    ],
)
def test_what_is_no_conversation_is_refused(make_tokenizer, messages, what):
    with pytest.raises(InputError) as caught:
        supervised_spans(make_tokenizer("chatml"), messages, where="d.jsonl:3")
    assert caught.value.what == what
    assert caught.value.where == "d.jsonl:3"


def test_where_it_cannot_be_determined_it_is_an_error(make_tokenizer):
    with pytest.raises(InputError, match="does not"):
        supervised_spans(make_tokenizer("scrambled"), chat("a", "one", "b", "two"))
