"""Columns and keys beside the words of a conversation: which are read, refused, or go nowhere."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

from dominie.core.errors import InputError
from dominie.data.ecommerce_formats import listed

Message = dict[str, Any]

_PROMPTS = ("question", "query", "input", "user", "human", "request", "source", "text")
_ANSWERS = ("answer", "response", "output", "assistant", "gpt", "bot", "model", "reply", "target")
_ANSWER_COLUMNS = (*_ANSWERS, "completion", "label")
_SYSTEMS = ("system", "system_prompt", "system_message", "system_instruction")
_CONTEXTS = ("context", "passage", "passages", "document", "contexts", "paragraph", "background")
_HISTORIES = ("history", "chat_history", "conversation_history", "dialogue_history")

READ_SYSTEMS = frozenset(_SYSTEMS)
"""Columns whose text opens a conversation as its system message."""
_READ_HISTORIES = _HISTORIES[:3]
_FLAGS = (
    *("train", "train_on_turn", "training", "trainable", "loss", "loss_mask"),
    *("learn", "trained", "is_trainable", "supervised"),
)
_WEIGHTS = ("weight", "loss_weight", "loss_scale", *_FLAGS)
_AMBIGUOUS = (
    *("mask", "masked", "is_masked", "ignore", "ignore_loss", "skip", "exclude"),
    *("train_detail", "training_detail"),
)
WEIGHT = "weight"
"""The key of a message under which every spelling of its weight is kept while a row is read."""
_REJECTED = (
    *("chosen", "rejected", "rejected_response", "rejected_messages", "rejected_completion"),
    *("preferred_output", "non_preferred_output"),
)
_VERDICTS = (
    *("label", "kto_tag", "train", "loss", "trainable", "desirable", "accepted", "is_accepted"),
    *("correct", "is_correct", "good", "is_good", "preferred", "is_preferred", "approved"),
)
_NUMBERS = ("kto_tag", "weight", "loss_weight", "loss_scale", "sample_weight")


# Advice


def renaming(columns: Mapping[str, Any]) -> str | None:
    """What to do about a row with these columns, which is of no known format; None if unknown.

    Nothing that may be part of the conversation is left out of the advice in silence.
    """
    for name, value in columns.items():
        first = value[0] if isinstance(value, list) and value else None
        if isinstance(first, dict) and {"role", "from"} & first.keys():
            to = "messages" if "content" in first else "conversations"
            return f"rename its column of messages: `{name}` to `{to}`"
    by_word = {str(name).strip().strip("_").lower(): str(name) for name in columns}
    if len(by_word) == 1:
        (name,) = by_word.values()
        for mark, name_of_mark in ((";", "semicolons"), ("\t", "tabs"), ("|", "bars")):
            if mark in name:
                return f"its columns are separated by {name_of_mark}: save the file with commas"
    prompts = [word for word in ("prompt", "instruction", *_PROMPTS) if word in by_word]
    answers = [word for word in _ANSWER_COLUMNS if word in by_word and word not in prompts[:1]]
    if not prompts or not answers:
        return None
    prompt, answer = prompts[0], answers[0]
    alpaca = prompt == "instruction"
    new = {prompt: prompt if alpaca else "prompt", answer: "output" if alpaca else "completion"}
    beside = [*prompts[1:], *(word for word in _CONTEXTS if word in by_word)]
    for words, name in (
        (beside[:1], "input" if alpaca and beside[:1] == ["input"] else "context"),
        ([word for word in by_word if _is_system(word)][:1], "system"),
        ([word for word in _HISTORIES if word in by_word][:1], "history"),
        ([word for word in ("tools",) if word in by_word], "tools"),
    ):
        new |= dict.fromkeys(words, name)
    read = {*READ_SYSTEMS, *_READ_HISTORIES}
    old = {by_word[w]: n for w, n in new.items() if by_word[w] not in ({n} | read)}
    pairs = ", ".join(f"`{name}` to `{name_to}`" for name, name_to in old.items())
    as_they_are = [by_word[w] for w in new if by_word[w] not in old]
    lost = [name for word, name in by_word.items() if word not in new]
    parts = [f"rename its columns: {pairs}"]
    if as_they_are:
        parts.append(f"read as it is: {_quoted(as_they_are)}")
    if lost:
        parts.append(
            f"not trained on: {_quoted(lost)}; join to one of these what is part of a conversation"
        )
    return "; ".join(parts)


def _is_system(word: str) -> bool:
    return word in _SYSTEMS or word in ("sys", "sys_prompt", "sys_message", "system_text")


def _quoted(names: Iterable[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


# Columns that are part of a conversation


def system_text(columns: Mapping[str, Any], where: str) -> tuple[str, str]:
    """The system prompt of a row and the name of its column; two empty texts if there is none.

    Raises:
        InputError: it is no text, or there are two.
    """
    found: dict[str, str] = {}
    for name in _SYSTEMS:
        value = columns.get(name, "")
        if not isinstance(value, str):
            raise wrong_type(f"`{name}`", value, "a string", where)
        if value.strip():
            found.setdefault(value.strip(), name)
    if len(found) > 1:
        raise InputError(
            "the row has two system prompts",
            where=where,
            expected="one of them, or the same text in both",
            found=_quoted(found.values()),
            do="join them in `system`, or remove one of the columns",
        )
    return next(((columns[name], name) for name in found.values()), ("", ""))


def with_context(question: str, columns: Mapping[str, Any], where: str) -> str:
    """A question with the text in `context` after it, unless the question has that in it.

    Raises:
        InputError: the context is neither a text nor a list of texts.
    """
    value = columns.get("context")
    passages = value if isinstance(value, list) else [value or ""]
    if not all(isinstance(passage, str) for passage in passages):
        raise InputError(
            "`context` is of the wrong type",
            where=where,
            expected="a text, or a list of texts, that belongs to the prompt",
            found=f"{type(value).__name__}: {shown(value)}",
            do="join it to one text, or rename the column if it is no part of the prompt",
        )
    context = "\n\n".join(passage for passage in passages if passage.strip())
    if not context or context.strip() in question:
        return question
    return f"{question}\n\n{context}" if question.strip() else context


def _history(columns: Mapping[str, Any]) -> tuple[str, Any]:
    """The column that holds the turns before this row's, and its value; empty if there are none."""
    found = [(name, columns[name]) for name in _READ_HISTORIES if columns.get(name)]
    return next(((n, v) for n, v in found if v not in ("[]", "null")), ("", None))


def refuse_history(columns: Mapping[str, Any], beside: str, where: str) -> None:
    """Refuse earlier turns beside a column that holds whole conversations."""
    name, _ = _history(columns)
    if name:
        raise InputError(
            f"the row has earlier turns in `{name}` beside its messages",
            where=where,
            expected=f"all turns in `{beside}`",
            found=column_names(columns),
            do=f"put the turns of `{name}` before the others in `{beside}`, or remove the column",
        )


def earlier_turns(columns: Mapping[str, Any], where: str) -> tuple[str, list[Message]]:
    """The column of a history, [[question, answer], …] mostly, and its messages as they stand.

    Raises:
        InputError: another layout.
    """
    name, value = _history(columns)
    if not name:
        return "", []
    turns = listed(value)
    if turns and all(isinstance(turn, dict) and {"role", "from"} & turn.keys() for turn in turns):
        return name, turns
    pairs = [_pair(turn) for turn in turns or [None]]
    if not all(pairs):
        raise InputError(
            f"`{name}` is of the wrong type",
            where=where,
            expected="the turns before: [[question, answer], …] or a list of messages",
            found=f"{type(value).__name__}: {shown(value)}",
            do="write it so, or rename the column if it holds no turns of this conversation",
        )
    return name, [
        {"role": role, "content": text}
        for pair in pairs
        for role, text in zip(("user", "assistant"), pair, strict=True)
    ]


def _pair(turn: Any) -> tuple[str, ...]:
    """Question and answer of an earlier turn; empty for anything else."""
    values: list[Any] = list(turn) if isinstance(turn, (list, tuple)) else []
    if isinstance(turn, dict):
        for names in (("prompt", "instruction", *_PROMPTS), _ANSWER_COLUMNS):
            values += [turn[name] for name in names if name in turn][:1]
        if len(values) != len(turn):
            return ()
    return tuple(values) if len(values) == 2 and all(isinstance(v, str) for v in values) else ()


# What is trained on


def take_weight(keys: Message, label: str, where: str) -> None:
    """Replace the keys of a message that say how much it counts by one number, if there are any.

    Raises:
        InputError: a key with two meanings, a value that is no weight, or two that differ.
    """
    for name in _AMBIGUOUS:
        if name in keys:
            raise InputError(
                f"`{name}` of {label} cannot be honoured",
                where=where,
                expected="`weight` of a whole message: 0, it is not trained on, up to 1",
                found=f"`{name}`: {shown(keys[name])}",
                do="say it with `weight`, or remove the key",
            )
    found = {name: keys.pop(name) for name in _WEIGHTS if name in keys}
    for name, value in found.items():
        number = isinstance(value, (bool, int, float)) and math.isfinite(value) and value >= 0
        if not number or (name in _FLAGS and value not in (0, 1)):
            expected = "true or false" if name in _FLAGS else "a number from 0 up, mostly 0 or 1"
            raise wrong_type(f"`{name}` of {label}", value, expected, where)
    values = {float(value) for value in found.values()}
    if len(values) > 1:
        raise InputError(
            f"the weights of {label} contradict each other",
            where=where,
            expected="one weight",
            found=", ".join(f"{name} {value!r}" for name, value in found.items()),
            do="keep the one that holds",
        )
    if values:
        keys[WEIGHT] = values.pop()


def split_weights(messages: list[Message], where: str = "") -> tuple[float, ...]:
    """Take the weights out of messages: one number for each message; empty if all are 1.

    Raises:
        InputError: no turn of the assistant has a weight above 0.
    """
    weights = tuple(message.pop(WEIGHT, 1.0) for message in messages)
    answers = [w for w, m in zip(weights, messages, strict=True) if m["role"] == "assistant"]
    if answers and not any(answers):
        raise InputError(
            "every assistant turn has the weight 0",
            where=where or None,
            expected="at least one answer to train on",
            found=f"{len(answers)} assistant turns",
            do="remove the row",
        )
    return weights if any(weight != 1 for weight in answers) else ()


def refuse_unanswered(columns: Mapping[str, Any], where: str) -> None:
    """Refuse a row of preferences, where the answer would be one of two columns."""
    found = [name for name in _REJECTED if name in columns]
    if found:
        raise InputError(
            "the row holds preferences, and no answer to train on",
            where=where,
            expected="one answer, in `completion`, `output` or as the last message",
            found=column_names(columns),
            do=f"there is no training on preferences: keep the better answer alone as `completion` "
            f"and remove {_quoted(found)}",
        )


def refuse_rejected(fields: Mapping[str, Any], where: str) -> None:
    """Refuse an answer that its row calls a bad one, which would be trained on like the others."""
    for name in dict.fromkeys((*_VERDICTS, *_NUMBERS)):
        value = fields.get(name)
        said = str(value).strip().lower()
        if said == "false" or (name in _NUMBERS and value == 0):
            raise InputError(
                f"the row says that its answer is not to be learnt: `{name}` is {said}",
                where=where,
                expected="answers to train on",
                found=f"`{name}`: {value!r}",
                do=f"choose the good answers with where: {{{name}: "
                f"{1 if name in _NUMBERS else 'true'}}} under data, remove the others, "
                "or rename the column if it says something else",
            )


def unread(columns: Mapping[str, Any], read: Iterable[str]) -> tuple[str, ...]:
    """The columns that hold something and that nothing reads."""
    known = set(read)
    return tuple(
        str(name)
        for name, value in columns.items()
        if name not in known and value not in ("", [], {}, "[]", "{}")
    )


# Messages of errors


def wrong_type(what: str, value: Any, expected: str, where: str) -> InputError:
    """The error for a value that is missing or of another type."""
    verb = "is missing" if value is None else "is of the wrong type"
    found = None if value is None else f"{type(value).__name__}: {shown(value)}"
    return InputError(f"{what} {verb}", where=where, expected=expected, found=found)


def column_names(columns: Mapping[str, Any]) -> str:
    """The columns of a row, the first eight by name."""
    names = [str(name) for name in columns]
    more = f" and {len(names) - 8} more" if len(names) > 8 else ""
    return f"columns {', '.join(names[:8])}{more}" if names else "no column"


def shown(value: Any) -> str:
    """A value as it is written in Python, cut to 80 characters."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:79]}…"
