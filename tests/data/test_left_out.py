"""What a chat template leaves out is named or refused, whatever part of a conversation it is."""

import json
from collections import Counter

import pytest
from kept_parts import outcomes
from published_templates import CHATS, FOLDER

from dominie.core.errors import InputError
from dominie.data.conversations import Conversation
from dominie.data.left_out import LeftOut
from dominie.data.rows import prepare
from dominie.data.sources import Source
from dominie.data.tokenization import encode_and_tell
from dominie.toyworld.toy_models import word_tokenizer

TOOL = {
    "type": "function",
    "function": {
        "name": "stock",
        "description": "Pieces in the shop.",
        "parameters": {
            "type": "object",
            "properties": {"item": {"type": "string", "description": "Its number."}},
        },
    },
}
CALL = {"function": {"name": "stock", "arguments": {"item": "7"}}}
OTHER = {"function": {"name": "stock", "arguments": '{"item": "8"}'}}


def user(content):
    return {"role": "user", "content": content}


def assistant(content, **more):
    return {"role": "assistant", "content": content, **more}


def system(content):
    return {"role": "system", "content": content}


RESULT = {"role": "tool", "content": "4"}
AGENT = [user("a"), assistant("", tool_calls=[CALL]), RESULT, assistant("Four.")]

# A template with everything; each test takes something from it.
CALLS = (
    "{% for c in m.tool_calls or [] %}<call>{{ c.function.name }} "
    "{{ c.function.arguments | tojson }}</call>{% endfor %}"
)
THOUGHTS = "{% if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>{% endif %}"
TOOLS = "{% if tools %}<tools>{{ tools | tojson }}</tools>{% endif %}"
CONTENT = "{{ m.content | trim }}"
WHOLE = (
    TOOLS + "{% for m in messages %}<|{{ m.role }}|>" + THOUGHTS + CONTENT + CALLS + "<|end|>"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def told(template, messages, tools=None):
    """What is said to be left out, as (kind, first place)."""
    tokenizer = word_tokenizer()
    tokenizer.chat_template = template
    conversation = Conversation(messages, tools, "data/d.jsonl:3")
    [(_, found)] = encode_and_tell(tokenizer, [conversation])
    assert all(each.conversations == 1 for each in found)
    return [(each.what, each.first) for each in found]


@pytest.mark.parametrize(
    "messages",
    [
        [user("a"), assistant("b")],
        [system("x"), user(" a\n"), assistant("b"), system("y"), user("a"), assistant("b")],
        [user("a"), assistant("b", reasoning_content="c")],
        [user("a"), assistant("<think>\nc\n</think>\nb")],
        [user("a"), assistant("b", reasoning_content="c", thinking="c")],
        AGENT,
        [user("a"), assistant("Look.", tool_calls=[CALL, OTHER]), RESULT, RESULT, assistant("b")],
        [user("a"), assistant("", tool_calls=[{"function": {"name": "now", "arguments": {}}}])],
    ],
)
def test_nothing_is_said_of_a_template_that_renders_all(messages):
    assert told(WHOLE, messages, [TOOL]) == []


@pytest.mark.parametrize(
    ("template", "messages", "expected"),
    [
        (
            WHOLE.replace(CONTENT, "{{ m.content if m.role != 'system' }}"),
            [system("Be brief."), user("a"), assistant("b")],
            [("system messages", "d.jsonl:3, message 1")],
        ),
        (  # a text that is elsewhere in the rendering too
            WHOLE.replace(CONTENT, "{{ m.content if m.role != 'system' }}"),
            [system("a"), user("a"), assistant("b")],
            [("system messages", "d.jsonl:3, message 1")],
        ),
        (
            WHOLE.replace(CONTENT, "{{ m.content if loop.first or m.role != 'system' }}"),
            [system("x"), user("a"), assistant("b"), system("y"), user("c"), assistant("d")],
            [("system messages", "d.jsonl:3, message 4")],
        ),
        (
            WHOLE.replace(THOUGHTS, ""),
            [user("a"), assistant("b", reasoning_content="c"), user("d"), assistant("e")],
            [("thoughts", "d.jsonl:3, message 2")],
        ),
        (
            WHOLE.replace("m.content", "m.content.split('</think>')[-1]"),
            [user("a"), assistant("<think>\nc\n</think>\nb")],
            [("thoughts", "d.jsonl:3, message 2")],
        ),
        (
            WHOLE.replace(THOUGHTS, "{% if loop.last %}" + THOUGHTS + "{% endif %}"),
            [
                user("a"),
                assistant("b", reasoning_content="c"),
                user("d"),
                assistant("e", reasoning_content="f"),
            ],
            [
                (
                    "thoughts of earlier turns, which it keeps in the last turn alone",
                    "d.jsonl:3, message 2",
                )
            ],
        ),
        (WHOLE.replace(TOOLS, ""), AGENT, [("the tools on offer", "d.jsonl:3")]),
        (
            WHOLE.replace("tools | tojson", "tools | map(attribute='function.name') | join"),
            AGENT,
            [
                ("descriptions of tools", "d.jsonl:3"),
                ("parameters of tools", "d.jsonl:3"),
                ("descriptions of parameters of tools", "d.jsonl:3"),
            ],
        ),
        (
            WHOLE.replace(CONTENT, "{{ m.content if m.role != 'tool' }}"),
            AGENT,
            [("results of tools", "d.jsonl:3, message 3")],
        ),
        (
            WHOLE.replace(CONTENT, "{{ m.content if not m.tool_calls }}"),
            [user("a"), assistant("Look.", tool_calls=[CALL]), RESULT, assistant("Four.")],
            [("words beside a tool call", "d.jsonl:3, message 2")],
        ),
    ],
)
def test_what_is_left_out_is_told_with_its_row_and_message(template, messages, expected):
    assert template != WHOLE
    assert told(template, messages, [TOOL]) == expected


@pytest.mark.parametrize(
    ("template", "messages", "what"),
    [
        (
            WHOLE.replace("in m.tool_calls or []", "in (m.tool_calls or [])[:1]"),
            [user("a"), assistant("", tool_calls=[CALL, OTHER]), RESULT, assistant("b")],
            "leaves out a tool call",
        ),
        (
            WHOLE.replace("{{ c.function.arguments | tojson }}", ""),
            AGENT,
            "leaves out arguments of a tool call",
        ),
        (WHOLE.replace(CALLS, ""), AGENT, "leaves out a tool call"),
        (
            WHOLE.replace(CONTENT, "{{ m.content if m.role != 'user' or loop.first }}"),
            [user("a"), assistant("b"), user("c"), assistant("d")],
            "leaves out a question",
        ),
    ],
)
def test_what_nobody_can_want_to_be_left_out_is_refused(template, messages, what):
    with pytest.raises(InputError, match=what) as refused:
        told(template, messages, [TOOL])
    assert refused.value.where == "data/d.jsonl:3"


def test_a_conversation_is_whole_though_the_template_refuses_what_comes_before_its_question():
    needs = (
        "{% if messages | selectattr('role', 'equalto', 'user') | list | length == 0 %}"
        "{{ raise_exception('no question') }}{% endif %}"
    )
    assert told(needs + WHOLE, [system("x"), assistant("b"), user("a"), assistant("c")]) == []


def test_a_template_that_looks_at_the_words_is_asked_again():
    """Its first conversation is whole; a later one of the same roles is not."""
    tokenizer = word_tokenizer()
    content = "{{ m.content if m.content != 'red' or m.role == 'assistant' }}"
    tokenizer.chat_template = WHOLE.replace(CONTENT, content)
    blue, red = ([system(s), user("copy"), assistant("one")] for s in ("blue", "red"))
    [_, (_, found)] = encode_and_tell(tokenizer, [Conversation(blue), Conversation(red)])
    assert [each.what for each in found] == ["system messages"]


def test_conversations_are_counted_and_the_first_named_by_any_number_of_processes(tmp_path):
    path = tmp_path / "d.jsonl"
    chats = [
        [user(f"copy {n}"), assistant("one", **({"reasoning_content": "two"} if n % 3 else {}))]
        for n in range(30)
    ]
    path.write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats))
    tokenizer = word_tokenizer()
    tokenizer.chat_template = WHOLE.replace(THOUGHTS, "")
    summaries = [
        prepare(
            {"d": Source(name="d", path=str(path))},
            tokenizer,
            max_length=64,
            cache=tmp_path / f"cache{processes}",
            processes=processes,
        )["d"].summary
        for processes in (1, 2, 2)  # the last time what was made before is read
    ]
    assert summaries[0] == summaries[1] == summaries[2]
    [lost] = summaries[0].left_out
    assert lost == LeftOut("thoughts", 20, "d.jsonl:2, message 2")
    line = lost.line("d", summaries[0].kept)
    assert line.startswith("warning: d: the chat template leaves out thoughts, in 20 of 30 conv")


# Published templates, where they are beside the repository

NAMES = sorted(path.stem for path in FOLDER.glob("*.jinja"))
SAMPLE = [
    "axo--command_a_rag",
    "ikl--openai-gpt-oss-120b",
    "ikl--mistralai-Mistral-Nemo-Instruct-2407",
    "ikl--Qwen-Qwen3-0.6B",
]


def silent_under(names):
    found = {
        pair: Counter(outcomes(*pair)) for pair in ((n, kind) for n in names for kind in CHATS)
    }
    assert sum(each["named"] for each in found.values()) > len(names)
    assert sum(each["kept"] for each in found.values()) > 50 * len(names)
    return [pair for pair, each in found.items() if each["silent"] or each["named falsely"]]


@pytest.mark.skipif(not set(SAMPLE) <= set(NAMES), reason=f"these templates are not in {FOLDER}")
def test_nothing_is_left_out_in_silence():
    assert not silent_under(SAMPLE)


@pytest.mark.full
@pytest.mark.timeout(900)
@pytest.mark.skipif(not NAMES, reason=f"no templates in {FOLDER}; set DOMINIE_TEMPLATES")
def test_nothing_is_left_out_in_silence_under_any_of_them():
    assert not silent_under(NAMES)
