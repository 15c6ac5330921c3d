"""One row of a source of prompts -> a conversation that ends where an answer is asked for."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from dominie.core.errors import InputError
from dominie.data.formats import SHAREGPT_ROLES, Conversation, parsed_row

#: Stands for an answer that is not there while a row is read.
_ANSWER = "."


def parsed_prompt(row: Any, where: str) -> Conversation:
    """The conversation in a row up to its last answer, which need not be there.

    Args:
        row: the decoded row, of any known format.
        where: the file and line, for messages.

    Raises:
        InputError: as `parsed_row`, or nobody asks anything.
    """
    added = _answer(row) if isinstance(row, dict) else {}
    conversation = parsed_row(row | added if added else row, where)
    asked = conversation.messages[: conversation.last_answer]
    if not any(message["role"] in ("user", "tool") for message in asked):
        raise InputError(
            "the row has no prompt",
            where=where,
            expected="a message of the user, or a tool's result, to answer",
            found=f"roles {', '.join(m['role'] for m in asked) or 'none'} before the answer",
            do="remove the row, or the key `prompts` of its source",
        )
    unread = conversation.unread if added else (*conversation.unread, "the last answer")
    return dataclasses.replace(conversation, messages=asked, weights=(), unread=unread, prompt=True)


def _answer(row: Mapping[str, Any]) -> dict[str, Any]:
    """The columns that give a row an answer if it has none; nothing if it has one."""
    for column in ("messages", "conversations"):
        turns = row.get(column)
        if isinstance(turns, list) and turns and isinstance(turns[-1], dict):
            role, content = ("role", "content") if "role" in turns[-1] else ("from", "value")
            if SHAREGPT_ROLES.get(str(turns[-1].get(role))) == "assistant":
                return {}
            return {column: [*turns, {role: "assistant", content: _ANSWER}]}
    for question, answer_column in (("prompt", "completion"), ("instruction", "output")):
        if question in row and row.get(answer_column) is None:
            return {answer_column: _ANSWER}
    return {}
