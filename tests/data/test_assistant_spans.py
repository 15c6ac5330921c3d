"""Masks against a slow reference: each family's layout written out by hand, token bytes counted."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders

from dominie.core.errors import InputError
from dominie.data.conversations import Conversation
from dominie.data.tokenization import encode, encode_all, prompt_ids

TOOLS = [{"type": "function", "function": {"name": "stock", "parameters": {"type": "object"}}}]
CALL = {"function": {"name": "stock", "arguments": {"id": 7}}}


def user(content):
    return {"role": "user", "content": content}


def assistant(content, **more):
    return {"role": "assistant", "content": content, **more}


def system(content):
    return {"role": "system", "content": content}


# The reference. A layout gives the text of a conversation in segments: (text, of the assistant?).


def mistral_layout(messages, tools):
    opening = ""
    if messages[0]["role"] == "system":
        opening, messages = messages[0]["content"] + "\n\n", messages[1:]
    yield "<s>", False
    for k, message in enumerate(messages):
        if message["role"] == "user":
            yield f"[INST] {'' if k else opening}{message['content']} [/INST]", False
        else:
            yield f" {message['content']}</s>", True


def headed_layout(bos, opening, closing, after, strip=False, names=()):
    def layout(messages, tools):
        yield bos, False
        for message in messages:
            content = message["content"].strip() if strip else message["content"]
            role = dict(names).get(message["role"], message["role"])
            yield opening.format(role), False
            yield content + closing, message["role"] == "assistant"
            yield after, False

    return layout


def qwen3_layout(messages, tools):
    last_question = max(k for k, m in enumerate(messages) if m["role"] == "user")
    for k, message in enumerate(messages):
        answers = message["role"] == "assistant"
        yield f"<|im_start|>{message['role']}\n", False
        content = message["content"]
        if answers:
            thoughts, _, spoken = content.rpartition("</think>")
            thoughts = thoughts.split("</think>")[0].split("<think>")[-1].strip("\n")
            content = spoken.lstrip("\n") if "</think>" in content else content
            if k > last_question and (k + 1 == len(messages) or thoughts):
                content = f"<think>\n{thoughts}\n</think>\n\n" + content.lstrip("\n")
        yield content + "<|im_end|>", answers
        yield "\n", False


def r1_layout(messages, tools):
    yield "<|begin|>", False
    for message in messages:
        if message["role"] == "assistant":
            yield "<|Assistant|>", False
            yield message["content"].split("</think>")[-1] + "<|end|>", True
        else:
            yield "<|User|>" + message["content"], False


chatml_layout = headed_layout("", "<|im_start|>{}\n", "<|im_end|>", "\n")
LAYOUTS = {
    "mistral": mistral_layout,
    "llama3": headed_layout(
        "<|begin_of_text|>",
        "<|start_header_id|>{}<|end_header_id|>\n\n",
        "<|eot_id|>",
        "",
        strip=True,
    ),
    "chatml": chatml_layout,
    "marked": chatml_layout,
    "marked_macro": chatml_layout,
    "marked_last": chatml_layout,
    "qwen3": qwen3_layout,
    "gemma": headed_layout(
        "<bos>",
        "<start_of_turn>{}\n",
        "<end_of_turn>",
        "\n",
        strip=True,
        names=[("assistant", "model")],
    ),
    "zephyr": headed_layout("", "<|{}|>\n", "</s>", "\n"),
    "r1": r1_layout,
}


def token_bytes(tokenizer, number):
    token = tokenizer.convert_ids_to_tokens(number)
    if token in tokenizer.added_tokens_encoder:
        return token.encode()
    if token.startswith("<0x"):
        return bytes([int(token[3:5], 16)])
    if isinstance(tokenizer.backend_tokenizer.decoder, decoders.ByteLevel):
        return bytes(BYTE_OF[character] for character in token)
    return token.replace("▁", " ").encode()


def _byte_of():
    """The byte that each character of a byte-level vocabulary stands for (as GPT-2 has it)."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in plain]
    return {chr(b): b for b in plain} | {chr(256 + n): b for n, b in enumerate(others)}


BYTE_OF = _byte_of()


def reference(tokenizer, segments):
    """The text, and for each token whether a byte of it lies in a segment of the assistant."""
    segments = list(segments)
    text = "".join(part for part, _ in segments)
    owners = [by for part, by in segments for _ in part.encode()]
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    pieces = [token_bytes(tokenizer, number) for number in ids]
    if b"".join(pieces) == b" " + text.encode():  # the space that SentencePiece sets first
        owners = [False, *owners]
    assert sum(map(len, pieces)) == len(owners)
    mask, at = [], 0
    for piece in pieces:
        mask.append(any(owners[at : at + len(piece)]))
        at += len(piece)
    return ids, mask


def check(tokenizer, family, messages, tools=None):
    encoded = encode(tokenizer, Conversation(messages, tools, "x:1"))
    ids, mask = reference(tokenizer, LAYOUTS[family](messages, tools))
    assert encoded.input_ids == ids
    assert encoded.supervised == mask
    return encoded


CHATS = {
    "one turn": [user("What is two plus two?"), assistant("four")],
    "three turns": [
        user("a"),
        assistant("one"),
        user("b"),
        assistant("two"),
        user("c"),
        assistant("3"),
    ],
    "ends with a question": [user("a"), assistant("one"), user("b")],
    "repeats itself": [user("a"), assistant("a"), user("a"), assistant("a")],
    "unicode": [
        user("Größe? 你好"),
        assistant("🙂 🇩🇪 e\u0301 привет\u200b"),
        user("😀"),
        assistant("😀"),
    ],
    "white space": [user("  a \n"), assistant(" \n one \t\n"), user("\n"), assistant("  x  ")],
    "markers": [
        user("Say <|im_end|>\n<|im_start|>assistant\nfour [/INST] five</s><|assistant|>\n"),
        assistant("[INST] <|im_start|>user\n<end_of_turn>\n<|eot_id|> six [/INST]"),
        user("</s>"),
        assistant("<start_of_turn>model\n</s> [INST]"),
    ],
    "probe": [user("qxprobe"), assistant("qxprobeqx"), user("qxprobe"), assistant("qxprobe")],
}
FAMILIES = sorted(LAYOUTS)


@pytest.mark.parametrize("chat", CHATS)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_mask_is_the_references(make_tokenizer, family, chat):
    encoded = check(make_tokenizer(family), family, CHATS[chat])
    assert any(encoded.supervised)


@pytest.mark.parametrize("family", sorted(set(FAMILIES) - {"gemma"}))
def test_a_system_message_is_not_supervised(make_tokenizer, family):
    check(make_tokenizer(family), family, [system("Be brief."), *CHATS["three turns"]])


@pytest.mark.parametrize("family", ["chatml", "llama3", "zephyr", "qwen3", "marked"])
def test_assistants_may_speak_first_and_twice(make_tokenizer, family):
    check(make_tokenizer(family), family, [assistant("Hello!"), user("a"), assistant("one")])
    check(make_tokenizer(family), family, [user("a"), assistant("one"), assistant("two")])


@settings(max_examples=25, deadline=None)
@given(
    contents=st.lists(
        st.text(max_size=8) | st.sampled_from(["<|im_end|>", "</s>", "[/INST]", "\n", "<think>\n"]),
        min_size=2,
        max_size=5,
    )
)
@pytest.mark.parametrize("family", ["mistral", "llama3", "chatml", "qwen3", "gemma", "zephyr"])
def test_the_mask_is_the_references_for_any_text(make_tokenizer, family, contents):
    messages = [(assistant if k % 2 else user)(text) for k, text in enumerate(contents)]
    check(make_tokenizer(family), family, messages)


@pytest.mark.parametrize("family", ["qwen3", "r1"])
def test_thoughts_that_the_template_removes_are_not_looked_for(make_tokenizer, family):
    thought = "<think>\nlet me see\n</think>\n\n"
    messages = [user("a"), assistant(thought + "one"), user("b"), assistant(thought + "two")]
    check(make_tokenizer(family), family, messages)


def test_thoughts_after_the_last_question_are_supervised(make_tokenizer):
    tokenizer = make_tokenizer("qwen3")
    messages = [user("a"), assistant("<think>\nhm\n</think>\n\none")]
    encoded = check(tokenizer, "qwen3", messages)
    told = [i for i, by in zip(*encoded[:2], strict=True) if by]
    assert tokenizer.decode(told) == "<think>\nhm\n</think>\n\none<|im_end|>"


def supervised_texts(tokenizer, messages, tools=None):
    """The decoded runs of supervised tokens."""
    encoded = encode(tokenizer, Conversation(messages, tools, "x:1"))
    runs, before = [], False
    for number, by in zip(*encoded[:2], strict=True):
        if by:
            runs = [*runs, []] if not before else runs
            runs[-1].append(number)
        before = by
    return [tokenizer.decode(run) for run in runs]


AGENT = [
    user("How many?"),
    assistant("", tool_calls=[CALL]),
    {"role": "tool", "content": "4"},
    assistant("Four."),
    user("And now?"),
    assistant("Let me look.", tool_calls=[CALL, CALL]),
    {"role": "tool", "content": "5"},
    assistant("Five."),
]


@pytest.mark.parametrize("family", ["chatml", "qwen3"])
def test_tool_calls_are_turns_of_the_assistant(make_tokenizer, family):
    call = f"<tool_call>\n{json.dumps(CALL['function'])}\n</tool_call>"
    thought = "<think>\n\n</think>\n\n" if family == "qwen3" else ""
    assert supervised_texts(make_tokenizer(family), AGENT, TOOLS) == [
        f"{call}<|im_end|>",
        "Four.<|im_end|>",
        f"Let me look.\n{call}\n{call}<|im_end|>",
        f"{thought}Five.<|im_end|>",
    ]


def test_turns_are_found_where_tools_move_to_the_last_question(make_tokenizer):
    call = json.dumps(CALL["function"])
    tokenizer = make_tokenizer("mistral_tools")
    assert supervised_texts(tokenizer, [system("Be brief."), *AGENT], TOOLS) == [
        f"[TOOL_CALLS] {call}</s>",
        " Four.</s>",
        f"[TOOL_CALLS] {call}{call}</s>",
        " Five.</s>",
    ]


def test_history_may_end_its_turns_with_another_token(make_tokenizer):
    assert supervised_texts(make_tokenizer("harmony"), CHATS["three turns"]) == [
        "<|message|>one<|end|>",
        "<|message|>two<|end|>",
        "<|message|>3<|return|>",
    ]


def test_arguments_given_as_json_text_are_not_quoted_twice(make_tokenizer):
    text = {"function": {"name": "stock", "arguments": '{"id": 7}'}}
    tokenizer = make_tokenizer("chatml")
    as_text, as_object = (
        encode(tokenizer, Conversation([user("a"), assistant("", tool_calls=[call])]))
        for call in (text, CALL)
    )
    assert as_text == as_object


def test_arguments_are_text_for_a_template_that_adds_them_to_text(make_tokenizer):
    tokenizer = make_tokenizer("chatml")
    tokenizer.chat_template = tokenizer.chat_template.replace(
        "call['function'] | tojson", "call['function']['name'] + call['function']['arguments']"
    )
    messages = [user("a"), assistant("", tool_calls=[CALL])]
    assert supervised_texts(tokenizer, messages) == [
        '<tool_call>\nstock{"id": 7}\n</tool_call><|im_end|>'
    ]


def test_the_end_of_a_turn_is_told_from_the_end_of_the_document(make_tokenizer):
    messages = CHATS["three turns"]
    runs = supervised_texts(make_tokenizer("phi"), messages)
    assert runs[:2] == ["one<|end|>", "two<|end|>"]
    assert runs[2].startswith("3<|end|>")


def test_tools_reach_the_template(make_tokenizer):
    tokenizer = make_tokenizer("chatml")
    messages = CHATS["one turn"]
    encoded = encode(tokenizer, Conversation(messages, TOOLS, "x:1"))
    assert json.dumps(TOOLS[0]) in tokenizer.decode(encoded.input_ids)


def test_a_turn_without_a_token_of_its_own_ends_in_white_space(make_tokenizer):
    tokenizer = make_tokenizer("chatml")
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['role'] + ':\\n' + m['content'] + '\\n\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant:\\n' }}{% endif %}"
    )
    assert supervised_texts(tokenizer, CHATS["three turns"]) == ["one\n\n", "two\n\n", "3\n\n"]


def test_templates_by_name_are_chosen_by_the_tools(make_tokenizer):
    tokenizer = make_tokenizer("chatml")
    plain = tokenizer.chat_template
    tokenizer.chat_template = {"default": plain, "tool_use": "{{ 'TOOLS' }}" + plain}
    messages = CHATS["one turn"]
    with_tools = encode(tokenizer, Conversation(messages, TOOLS, "x:1"))
    without = encode(tokenizer, Conversation(messages, None, "x:1"))
    assert tokenizer.decode(with_tools.input_ids).startswith("TOOLS")
    assert tokenizer.decode(without.input_ids).startswith("<|im_start|>")


def test_several_are_encoded_as_each_is_alone(make_tokenizer):
    tokenizer = make_tokenizer("llama3")
    chats = [Conversation(messages, None, name) for name, messages in CHATS.items()]
    assert encode_all(tokenizer, chats) == [encode(tokenizer, chat) for chat in chats]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_prompt_begins_what_is_trained_on(make_tokenizer, family):
    tokenizer = make_tokenizer(family)
    messages = CHATS["one turn"]
    prompt = prompt_ids(tokenizer, messages[:1])
    encoded = encode(tokenizer, Conversation(messages, None, "x:1"))
    common = len(prompt) if family != "r1" else encoded.supervised.index(True)
    assert prompt[:common] == encoded.input_ids[:common]
    assert not any(encoded.supervised[:common])
    assert encoded.supervised[common]


# Faults


@pytest.mark.parametrize(
    ("family", "messages", "found"),
    [
        ("gemma", [system("Be brief."), *CHATS["one turn"]], "System role not supported"),
        ("mistral", [user("a"), user("b"), assistant("c")], "roles must alternate"),
    ],
)
def test_what_a_template_refuses_is_named_with_its_row(make_tokenizer, family, messages, found):
    with pytest.raises(InputError, match="template fails on this conversation") as caught:
        encode(make_tokenizer(family), Conversation(messages, None, "data/x.jsonl:17"))
    assert caught.value.where == "data/x.jsonl:17"
    assert found in caught.value.found


@pytest.mark.parametrize(
    "template",
    [
        "{{ messages[0].content.nothing() }}",
        "{% for %}",
        "{{ messages + 1 }}",
        "{{ ''.__class__() }}",
    ],
)
def test_broken_and_forbidden_templates_are_input_errors(make_tokenizer, template):
    tokenizer = make_tokenizer("chatml")
    tokenizer.chat_template = template
    with pytest.raises(InputError, match="template fails on this conversation"):
        encode(tokenizer, Conversation(CHATS["one turn"], None, "x:1"))
    with pytest.raises(InputError, match="template fails on this conversation"):
        prompt_ids(tokenizer, [user("a")], where="x:1")


def test_a_template_that_hides_its_turns_is_refused(make_tokenizer):
    tokenizer = make_tokenizer("chatml")
    tokenizer.chat_template = tokenizer.chat_template and make_tokenizer("scrambled").chat_template
    with pytest.raises(InputError, match="does not show where the assistant's turns are") as caught:
        encode(tokenizer, Conversation(CHATS["three turns"], None, "x:1"))
    assert caught.value.where == "x:1"
    assert "generation" in caught.value.do


def test_a_template_that_leaves_answers_out_is_refused(make_tokenizer):
    tokenizer = make_tokenizer("chatml")
    tokenizer.chat_template = "{% for m in messages[::2] %}{{ m['content'] }}{% endfor %}"
    with pytest.raises(InputError, match="leaves out an answer"):
        encode(tokenizer, Conversation(CHATS["one turn"], None, "x:1"))


def test_a_template_without_tool_calls_is_refused_where_there_are_any(make_tokenizer):
    with pytest.raises(InputError, match="leaves out a tool call") as caught:
        encode(make_tokenizer("marked"), Conversation(AGENT, TOOLS, "x:1"))
    assert "'stock' in the turn of message 2" in caught.value.expected


def test_a_template_that_takes_contents_for_lists_is_refused(make_tokenizer):
    tokenizer = make_tokenizer("chatml")
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['role'] }}:"
        "{% for part in m['content'] %}{{ part['text'] }}{% endfor %}<|im_end|>"
        "{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
    )
    with pytest.raises(InputError, match="leaves out an answer") as caught:
        encode(tokenizer, Conversation(CHATS["one turn"], None, "x:1"))
    assert caught.value.where == "x:1"


def test_a_tokenizer_without_a_template_is_refused(make_tokenizer):
    tokenizer = make_tokenizer("chatml")
    tokenizer.chat_template = None
    with pytest.raises(InputError, match="no chat template"):
        encode(tokenizer, Conversation(CHATS["one turn"], None, "x:1"))


def test_a_slow_tokenizer_is_refused():
    class Slow:
        is_fast = False
        chat_template = "x"
        name_or_path = "some/model"

    with pytest.raises(InputError, match="does not give the positions of its tokens") as caught:
        encode(Slow(), Conversation(CHATS["one turn"], None, "x:1"))
    assert "some/model" in caught.value.where
