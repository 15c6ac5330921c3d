"""One row of any known format -> the messages, tools and further columns of a conversation."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from dominie.core.errors import InputError
from dominie.data.columns import (
    READ_SYSTEMS,
    WEIGHT,
    column_names,
    earlier_turns,
    refuse_history,
    refuse_unanswered,
    renaming,
    shown,
    split_weights,
    system_text,
    take_weight,
    unread,
    with_context,
    wrong_type,
)
from dominie.data.ecommerce_formats import benchmark_question, options_text
from dominie.data.json_files import DECODER, check_encodable, drop_inner_nulls

Message = dict[str, Any]
Scalar = str | int | float | bool
Field = Scalar | list[Scalar]
ROLES = ("system", "user", "assistant", "tool")
_ROLES = {**{role: role for role in ROLES}, "function": "tool"}  # as OpenAI had it first
SHAREGPT_ROLES = {
    **{role: role for role in ROLES},
    **dict.fromkeys(("human",), "user"),
    **dict.fromkeys(("gpt", "chatgpt", "model", "bot", "bing", "bard"), "assistant"),
    **dict.fromkeys(("observation", "function_response", "function"), "tool"),
    "function_call": "assistant",
}
_KNOWN_FORMATS = (
    "a column `messages` or `conversations`, or columns `prompt` and `completion`, "
    "or `instruction`, (`input`,) `output`, or a benchmark's, see docs/data.md"
)


@dataclass(frozen=True, slots=True)
class Conversation:
    """A conversation with at least one assistant turn, or up to where one is asked for.

    Args:
        messages: in order, each with `role` (system, user, assistant or tool), `content` (text) and
            whatever else the row gave it, `tool_calls` say.
        tools: JSON schemas of the tools on offer, or None.
        where: the file and line it was read from.
        fields: the remaining columns that hold one value, such as `family`, or a list of them.
        weights: how much each message counts where it is trained on; empty if all count alike.
        unread: columns and keys that are part of neither.
        prompt: whether the last answer is asked for, and not there.
    """

    messages: list[Message]
    tools: list[dict[str, Any]] | None = None
    where: str = ""
    fields: dict[str, Field] = field(default_factory=dict)
    weights: tuple[float, ...] = ()
    unread: tuple[str, ...] = ()
    prompt: bool = False

    @property
    def last_answer(self) -> int:
        """Where the last assistant turn stands among the messages, or would."""
        turns = [i for i, m in enumerate(self.messages) if m["role"] == "assistant"]
        return len(self.messages) if self.prompt else turns[-1]

    @property
    def answer(self) -> str:
        """The text of the last assistant turn."""
        return str(self.messages[self.last_answer]["content"])


def parsed_row(row: Any, where: str) -> Conversation:
    """The conversation in a row, its format recognised by its columns.

    Args:
        row: the decoded row, an object from column to value; a null is an absent column.
        where: the file and line, for messages.

    Raises:
        InputError: a row of no known format, a wrong type, an unknown role, or no answer in it.
    """
    if not isinstance(row, dict):
        raise wrong_type("the row", row, 'an object: {"messages": […]}', where)
    columns = {key: value for key, value in row.items() if value is not None}
    nulls = drop_inner_nulls(columns)
    found = benchmark_question(columns, where)
    if found is None:
        messages, used = _messages_and_columns(columns, where)
    else:
        messages, used = _question(found.question, "question", where), found.columns
        messages.append({"role": "assistant", "content": found.answer})
        columns |= found.fields
        used = used - found.fields.keys()
    lost = _add_system(messages, columns, where)
    tools = _tools(columns.get("tools"), where)
    if messages[-1]["role"] != "assistant":
        refuse_unanswered(columns, where)
    _check_answered(messages, where)
    check_encodable(messages, tools, where)
    weighted = {m["role"] for m in messages if m["role"] != "assistant" and m.get(WEIGHT)}
    lost += [f"weight of {role} messages" for role in sorted(weighted)]
    lost += ["null in tools or tool calls"] if nulls else []
    used |= {*READ_SYSTEMS, "tools"}
    fields = {key: value for key, value in columns.items() if key not in used and _is_field(value)}
    return Conversation(
        messages,
        tools,
        where,
        fields,
        split_weights(messages, where),
        (*lost, *unread(columns, {*used, *fields})),
    )


def _add_system(messages: list[Message], columns: Message, where: str) -> list[str]:
    """Open a conversation with its system prompt; return the name of a column that cannot."""
    text, name = system_text(columns, where)
    if text and messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": text})
    same = messages[0]["content"].strip() == text.strip()
    return [] if same or not text else [f"{name} beside a system message"]


def _is_field(value: Any) -> bool:
    """Whether a column is kept beside the conversation: one value, or a plain list of them."""
    values = value if isinstance(value, list) else [value]
    return bool(values) and all(isinstance(item, (str, int, float, bool)) for item in values)


def _messages_and_columns(columns: Message, where: str) -> tuple[list[Message], set[str]]:
    """The messages of a row and the columns they were read from."""
    for column in ("messages", "conversations"):
        if column in columns:
            refuse_history(columns, column, where)
            return parsed_messages(columns[column], where, column), {column}
    if "prompt" in columns and "completion" in columns:
        ask, question, answer = "prompt", columns["prompt"], columns["completion"]
        used = {ask, "completion"}
    elif "instruction" in columns and "output" in columns:
        ask, answer = "instruction", _string(columns, "output", where)
        parts = [_string(columns, key, where) for key in (ask, "input")]
        if "options" in columns:  # ECInstruct; they stay a field too, for whoever scores them
            parts.append(options_text(columns["options"]))
        question = "\n\n".join(part for part in parts if part.strip())
        used = {ask, "input", "output"}
    else:
        raise _unknown(columns, where)
    before: list[Message] = []
    if isinstance(question, str):
        question, alone = with_context(question, columns, where), question
        used |= {"context"} if question != alone else set()
        name, turns = earlier_turns(columns, where)
        if name:
            before, used = parsed_messages(turns, where, "conversations"), used | {name}
    else:  # messages
        refuse_history(columns, ask, where)
    asked = _text_or_messages(question, ask, "user", where)
    return before + asked + _text_or_messages(answer, "completion", "assistant", where), used


def _unknown(columns: Message, where: str) -> InputError:
    """The error for a row of no known format."""
    refuse_unanswered(columns, where)
    for prompt_key, answer_key in (("prompt", "completion"), ("instruction", "output")):
        if prompt_key in columns and renaming(columns) is None:
            return InputError(
                "the row has a prompt and no answer",
                where=where,
                expected=f"a column `{answer_key}` beside `{prompt_key}`",
                found=column_names(columns),
                do="remove the row or give it an answer",
            )
    return InputError(
        "the row is of no known format",
        where=where,
        expected=_KNOWN_FORMATS,
        found=column_names(columns),
        do=renaming(columns),
    )


def parsed_messages(value: Any, where: str, column: str = "messages") -> list[Message]:
    """Messages with their roles and contents checked, contents in parts joined to texts.

    Raises:
        InputError: what is given is no list of messages, or one of them has an unknown role.
    """
    if not isinstance(value, list):
        raise wrong_type(f"`{column}`", value, "a list of messages", where)
    if not value:
        raise InputError("the conversation has no message", where=where, found=f"`{column}`: []")
    return [
        _message(item, f"message {number}", column, where) for number, item in enumerate(value, 1)
    ]


def _message(value: Any, label: str, column: str, where: str) -> Message:
    """One message with `role` and `content` first, its other keys kept and nulls left out."""
    if not isinstance(value, dict):
        raise wrong_type(label, value, "an object with role and content", where)
    role_key, content_key = ("role", "content") if "role" in value else ("from", "value")
    given = value.get(role_key)
    roles = SHAREGPT_ROLES if column == "conversations" else _ROLES
    role = roles.get(given) if isinstance(given, str) else None
    if role is None:
        meant = str(given).lower().replace("developer", "system")
        raise InputError(
            f"{label} has an unknown role" if given is not None else f"{label} has no role",
            where=where,
            expected=", ".join(roles),
            found=shown(given) if given is not None else column_names(value),
            do=f"write it as {SHAREGPT_ROLES[meant]}" if meant in SHAREGPT_ROLES else None,
        )
    passed = (role_key, content_key, "role", "content")
    rest = {k: item for k, item in value.items() if k not in passed and item is not None}
    take_weight(rest, label, where)
    content = value.get(content_key)
    if role == "assistant" and isinstance(rest.get("function_call"), dict):  # before there were
        rest["tool_calls"] = _function_calls(rest.pop("function_call"), label, where)  # tool_calls
    if given == "function_call":
        rest["tool_calls"], content = _function_calls(content, label, where), ""
    calls = rest.get("tool_calls")
    if calls is not None:
        if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
            raise wrong_type(f"`tool_calls` of {label}", calls, "a list of objects", where)
        if not calls:
            del rest["tool_calls"]
    # Templates add contents to strings: a call without words has empty ones.
    if content is None and calls:
        content = ""
    return {"role": role, "content": _content(content, label, where), **rest}


def _content(value: Any, label: str, where: str) -> str:
    """A message's text; a list of text parts is joined as templates join it."""
    if isinstance(value, list) and all(
        isinstance(part, dict) and isinstance(part.get("text"), str) for part in value
    ):
        return "".join(part["text"] for part in value)
    if not isinstance(value, str):
        raise wrong_type(f"the content of {label}", value, "a string", where)
    return value


def _function_calls(value: Any, label: str, where: str) -> list[dict[str, Any]]:
    """The calls in a ShareGPT `function_call` message: JSON with name and arguments, or a list."""
    try:
        calls = DECODER.decode(value) if isinstance(value, str) else value
    except (ValueError, RecursionError):
        calls = None
    calls = [calls] if isinstance(calls, dict) else calls
    if not isinstance(calls, list) or not all(
        isinstance(call, dict) and isinstance(call.get("name"), str) for call in calls
    ):
        expected = 'JSON: {"name": …, "arguments": {…}}'
        raise wrong_type(f"the function call of {label}", value, expected, where)
    return [{"type": "function", "function": call} for call in calls]


def _text_or_messages(value: Any, column: str, role: str, where: str) -> list[Message]:
    if not isinstance(value, (str, list)):
        raise wrong_type(f"`{column}`", value, "a string or a list of messages", where)
    if isinstance(value, list):
        return parsed_messages(value, where, column)
    if role == "user":
        return _question(value, column, where)
    return [{"role": role, "content": value}]


def _question(text: str, column: str, where: str) -> list[Message]:
    if not text.strip():
        raise InputError("the prompt is empty", where=where, found=f"`{column}`: {shown(text)}")
    return [{"role": "user", "content": text}]


def _string(columns: Message, key: str, where: str) -> str:
    value = columns.get(key, "")
    if not isinstance(value, str):
        raise wrong_type(f"`{key}`", value, "a string", where)
    return value


def _tools(value: Any, where: str) -> list[dict[str, Any]] | None:
    """The tools of a row, given as a list of JSON schemas or as JSON text of one."""
    tools = value
    if isinstance(value, str) and value.strip():
        try:
            tools = DECODER.decode(value)
        except (ValueError, RecursionError):
            raise wrong_type("`tools`", value, "a list of JSON schemas", where) from None
    if not tools:
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise wrong_type("`tools`", value, "a list of JSON schemas", where)
    return tools


def _check_answered(messages: list[Message], where: str) -> None:
    """Refuse what there is nothing, or only silence, to learn from."""
    roles = [message["role"] for message in messages]
    if "assistant" not in roles:
        raise InputError(
            "the conversation has no assistant turn",
            where=where,
            expected="at least one message of the assistant",
            found=f"roles {', '.join(roles[:8])}{', …' if len(roles) > 8 else ''}",
            do="remove the row or give it an answer",
        )
    for number, message in enumerate(messages, 1):
        if (
            message["role"] == "assistant"
            and not message["content"].strip()
            and "tool_calls" not in message
        ):
            raise InputError(
                "an assistant turn is empty",
                where=where,
                expected="an answer or tool calls",
                found=f"message {number}: {shown(message['content'])}",
                do="remove the row or give it an answer",
            )
