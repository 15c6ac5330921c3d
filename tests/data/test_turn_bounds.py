"""Small templates, each with a trait of published ones; what is learnt is written out by hand."""

import pytest
from published_templates import TOOLS, bot, byte_tokenizer, call, result, system, user

from dominie.core.errors import InputError
from dominie.data import supervised_spans
from dominie.data.assistant_spans import ends_of_turn, unended

MARKERS = ["<s>", "</s>", "<|im_start|>", "<|im_end|>", "<think>", "</think>", "<call>", "</call>"]
MARKERS += ["<|user|>", "<|bot|>", "<|tool|>", "<|start|>", "<|stop|>", "<|say|>", "<|said|>"]
MARKERS += ["<result>", "</result>"]

ONE = [user("Alpha?"), bot("Beta.")]
TWO = [*ONE, user("Gamma?"), bot("Delta.")]
AGENT = [user("Warm?"), bot("", call()), result("3 degrees"), bot("Cold.")]
BESIDE = [user("Warm?"), bot("Let me look.", call()), result("3 degrees"), bot("Cold.")]

# A call is written as its name and its argument.
EACH = "{% for c in m.tool_calls or [] %}"
CALL = "{{ c.function.name }} {{ c.function.arguments.city }}"
CALLS = EACH + "<call>" + CALL + "</call>{% endfor %}"


def headed(before, after, prompt, end="", calls=CALLS):
    """A template: for each message what stands before it, its content and calls, what follows."""
    return (
        "<s>{% for m in messages %}" + before + "{{ m.content }}" + calls + after + "{% endfor %}"
        "{% if add_generation_prompt %}" + prompt + "{% endif %}" + end
    )


IM = "<|im_start|>{{ m.role }}\n"
BOT = "<|im_start|>assistant\n"
BY_ROLE = (
    "{% if m.role == 'assistant' %}<|bot|>{% elif m.role == 'tool' %}<|tool|>"
    "{% else %}<|user|>{% endif %}"
)
NEXT = "{% set next = messages[loop.index] if not loop.last else none %}"

TEMPLATES = {
    "its header is always there": headed(
        "<|start|>{{ m.role }}<|say|>",
        "{% if m.role == 'assistant' %}<|said|>{% endif %}<|stop|>",
        "",
        "<|start|>assistant<|say|><think></think>",
    ),
    "the next header ends a turn": headed(BY_ROLE, "", "<|bot|>"),
    "the document has an end of its own": headed(
        IM, "<|im_end|>\n", BOT, "{% if not add_generation_prompt %}</s>{% endif %}"
    ),
    "every turn is followed by another end": headed(
        IM, "<|im_end|>\n{% if m.role == 'assistant' %}</s>{% endif %}", BOT
    ),
    "the last turn has no end": headed(
        BY_ROLE, "{% if not loop.last or m.role == 'user' %}<|im_end|>{% endif %}", "<|bot|>"
    ),
    "the last turn alone has an end": headed(
        BY_ROLE, "{% if loop.last and m.role == 'assistant' %}</s>{% endif %}", "<|bot|>"
    ),
    "history ends with another token": headed(
        "<|start|>{{ m.role }}<|say|>",
        "{% if loop.last and m.role == 'assistant' %}<|stop|>{% else %}<|said|>{% endif %}",
        "<|start|>assistant",
    ),
    "a result is closed by what follows it": headed(
        NEXT + IM,
        "{% if m.role != 'tool' %}<|im_end|>\n{% elif next %}\n<|im_end|>{% endif %}",
        BOT,
    ),
    "results stand in the turn of the call": (
        "<s>{% for m in messages %}"
        "{% if m.role == 'tool' %}{{ m.content }}</result>"
        "{% elif m.role == 'assistant' and m.tool_calls %}<|im_start|>assistant\n"
        + CALLS
        + "<result>"
        "{% elif loop.previtem is defined and loop.previtem.role == 'tool' and m.role != 'user' %}"
        "{{ m.content }}<|im_end|>\n"
        "{% else %}" + IM + "{{ m.content }}<|im_end|>\n{% endif %}{% endfor %}"
        "{% if add_generation_prompt and messages[-1].role == 'user' %}" + BOT + "{% endif %}"
    ),
    "calls have ids in history": headed(
        NEXT + IM,
        "<|im_end|>\n",
        BOT,
        calls=EACH + "<call>" + CALL + "{% if next %}, {{ c.id }}{% endif %}</call>{% endfor %}",
    ),
    "thoughts are removed from history": (
        "<s>{% for m in messages %}" + IM + "{% if m.role == 'assistant' and loop.last %}"
        "<think>\n{{ m.reasoning_content }}\n</think>\n\n{% endif %}{{ m.content }}<|im_end|>\n"
        "{% endfor %}{% if add_generation_prompt %}" + BOT + "<think>\n{% endif %}"
    ),
    "the prompt has closed the thoughts": headed(
        IM, "<|im_end|>\n", BOT + "<think>\n\n</think>\n\n"
    ),
    "its header is indented otherwise": headed(
        "\n    ### {{ m.role }}:\n", "</s>\n", "\n  ### assistant:\n\n"
    ),
    "the prompt is there after questions alone": headed(
        IM, "<|im_end|>\n", "{% if messages[-1].role == 'user' %}" + BOT + "{% endif %}"
    ),
}
SAID = {
    "its header is always there": (
        [
            (ONE, ["Beta.<|said|><|stop|>"]),
            (TWO, ["Beta.<|said|><|stop|>", "Delta.<|said|><|stop|>"]),
            (AGENT, ["<call>weather Oslo1</call><|said|><|stop|>", "Cold.<|said|><|stop|>"]),
        ],
        ["<|stop|>"],
    ),
    "the next header ends a turn": (
        [
            (ONE, ["Beta.<|user|>"]),
            (TWO, ["Beta.<|user|>", "Delta.<|user|>"]),
            (AGENT, ["<call>weather Oslo1</call><|tool|>", "Cold.<|user|>"]),
            (AGENT[:2], ["<call>weather Oslo1</call><|tool|>"]),
            ([*ONE, bot("More.")], ["Beta.", "More.<|user|>"]),
            ([bot("Hi."), *ONE], ["Hi.<|user|>", "Beta.<|user|>"]),
        ],
        ["<|user|>", "<|tool|>"],
    ),
    "the document has an end of its own": (
        [(TWO, ["Beta.<|im_end|>", "Delta.<|im_end|>"])],
        ["<|im_end|>"],
    ),
    "every turn is followed by another end": (
        [(TWO, ["Beta.<|im_end|>", "Delta.<|im_end|>"]), (ONE, ["Beta.<|im_end|>"])],
        ["<|im_end|>"],
    ),
    "the last turn has no end": (
        [(ONE, ["Beta.<|im_end|>"]), (TWO, ["Beta.<|im_end|>", "Delta.<|im_end|>"])],
        ["<|im_end|>"],
    ),
    "the last turn alone has an end": ([(TWO, ["Beta.", "Delta.</s>"])], ["</s>"]),
    "history ends with another token": (
        [
            (TWO, ["<|say|>Beta.<|said|>", "<|say|>Delta.<|stop|>"]),
            ([bot("Hi."), *ONE], ["<|say|>Hi.<|said|>", "<|say|>Beta.<|stop|>"]),
        ],
        ["<|stop|>"],
    ),
    "a result is closed by what follows it": (
        [(AGENT, ["<call>weather Oslo1</call><|im_end|>", "Cold.<|im_end|>"])],
        ["<|im_end|>"],
    ),
    "results stand in the turn of the call": (
        [(AGENT, ["<call>weather Oslo1</call><result>", "Cold.<|im_end|>"])],
        ["<|im_end|>", "<result>"],
    ),
    "calls have ids in history": (
        [
            (AGENT, ["<call>weather Oslo1, call00001</call><|im_end|>", "Cold.<|im_end|>"]),
            (
                BESIDE,
                ["Let me look.<call>weather Oslo1, call00001</call><|im_end|>", "Cold.<|im_end|>"],
            ),
            (AGENT[:2], ["<call>weather Oslo1</call><|im_end|>"]),
        ],
        ["<|im_end|>"],
    ),
    "thoughts are removed from history": (
        [
            (
                [*ONE, user("Gamma?"), bot("Delta.", reasoning_content="Hm.")],
                ["Beta.<|im_end|>", "Hm.\n</think>\n\nDelta.<|im_end|>"],
            ),
        ],
        ["<|im_end|>"],
    ),
    "the prompt has closed the thoughts": (
        [
            (TWO, ["Beta.<|im_end|>", "Delta.<|im_end|>"]),
            (
                [ONE[0], bot("<think>\nHm.\n</think>\n\nYes.")],
                ["<think>\nHm.\n</think>\n\nYes.<|im_end|>"],
            ),
        ],
        ["<|im_end|>"],
    ),
    "its header is indented otherwise": ([(TWO, ["Beta.</s>", "Delta.</s>"])], ["</s>"]),
    "the prompt is there after questions alone": (
        [
            ([*ONE, bot("More.")], ["Beta.<|im_end|>", "More.<|im_end|>"]),
            (AGENT, ["<call>weather Oslo1</call><|im_end|>", "Cold.<|im_end|>"]),
        ],
        ["<|im_end|>"],
    ),
}


@pytest.fixture(scope="module")
def tokenizer():
    return byte_tokenizer(MARKERS, bos="<s>", eos="</s>")


def learnt(tokenizer, messages):
    tools = TOOLS if any("tool_calls" in message for message in messages) else None
    text, spans = supervised_spans(tokenizer, messages, tools)
    return [text[slice(*span)] for span in spans]


@pytest.mark.parametrize("trait", SAID)
def test_a_turn_is_what_the_model_would_write(tokenizer, trait):
    tokenizer.chat_template = TEMPLATES[trait]
    chats, ends = SAID[trait]
    for messages, expected in chats:
        assert learnt(tokenizer, messages) == expected
    assert tokenizer.convert_ids_to_tokens(ends_of_turn(tokenizer)) == ends


@pytest.mark.parametrize(
    ("template", "found"),
    [
        (  # the results are set between a call and the words beside it
            "<s>{% for m in messages %}{% if m.role != 'tool' %}" + IM + CALLS
            + "{% if m.tool_calls %}<result>{{ messages[loop.index].content }}</result>{% endif %}"
            "{{ m.content }}<|im_end|>\n{% endif %}{% endfor %}"
            "{% if add_generation_prompt %}" + BOT + "{% endif %}",
            "words of message 2 stand behind message 3",
        ),
        (  # the words beside a call are a turn of their own
            headed(IM + "{% if m.tool_calls %}" + CALLS + "<|im_end|>\n" + BOT + "{% endif %}",
                   "<|im_end|>\n", BOT, calls=""),
            "message 2 is not one turn",
        ),
        (  # the prompt is another than the header in the conversation
            headed("<|start|>{{ m.role }}<|say|>", "<|im_end|>\n", BOT),
            "the generation prompt is not before message 2",
        ),
    ],
)  # fmt: skip
def test_where_the_template_cannot_tell_the_row_is_named(tokenizer, template, found):
    tokenizer.chat_template = template
    with pytest.raises(InputError, match="does not show where the assistant's turns are") as caught:
        supervised_spans(tokenizer, BESIDE, TOOLS, where="d.jsonl:7")
    assert caught.value.where == "d.jsonl:7"
    assert caught.value.found == found


def test_a_template_without_a_token_at_the_end_has_no_end_of_turn(tokenizer):
    tokenizer.chat_template = headed("{{ m.role }}: ", "{{ '\n\n' }}", "assistant: ")
    assert learnt(tokenizer, TWO) == ["Beta.\n\n", "Delta.\n\n"]
    assert ends_of_turn(tokenizer) == []
    assert unended(tokenizer) == "\n\n"


def test_a_marker_that_is_no_token_ends_no_turn():
    tokenizer = byte_tokenizer([], bos="<s>", eos="</s>")
    tokenizer.chat_template = headed(IM, "<|im_end|>\n", BOT)
    assert learnt(tokenizer, TWO) == ["Beta.<|im_end|>\n", "Delta.<|im_end|>\n"]
    assert ends_of_turn(tokenizer) == []
    assert unended(tokenizer) == "<|im_end|>\n"


def test_a_template_that_wants_a_system_message_has_an_end_of_turn(tokenizer):
    wants = "{% if messages[0].role != 'system' %}{{ raise_exception('no system') }}{% endif %}"
    tokenizer.chat_template = wants + headed(IM, "<|im_end|>\n", BOT)
    assert learnt(tokenizer, [system("Be brief."), *ONE]) == ["Beta.<|im_end|>"]
    assert tokenizer.convert_ids_to_tokens(ends_of_turn(tokenizer)) == ["<|im_end|>"]
    tokenizer.chat_template = "{{ raise_exception('nothing is right') }}"
    assert ends_of_turn(tokenizer) == []
    assert unended(tokenizer) is None


def test_marks_leave_headers_and_what_follows_the_end_out(tokenizer):
    tokenizer.chat_template = (
        "<s>{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}" + IM
        + "{{ m.content }}<|im_end|>\n</s>{% endgeneration %}{% else %}" + IM
        + "{{ m.content }}<|im_end|>\n{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}" + BOT + "{% endif %}"
    )  # fmt: skip
    assert learnt(tokenizer, TWO) == ["Beta.<|im_end|>", "Delta.<|im_end|>"]
