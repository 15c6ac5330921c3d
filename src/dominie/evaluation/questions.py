"""Conversations as questions: what is asked, what should be answered, in one model's tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dominie.data.conversations import Conversation
from dominie.data.templates import Encoded, encode_all, prompt_ids
from dominie.errors import InputError


@dataclass(frozen=True)
class Question:
    """A conversation whose last assistant turn is to be given.

    Attributes:
        prompt: what is asked, as text for a person.
        target: the last assistant turn.
        group: what its score is broken down by, None without one.
        prompt_ids: tokens up to where the assistant begins to speak.
        encoded: the whole conversation in tokens, with the supervised mask.
        conversation: as it was read.
    """

    prompt: str
    target: str
    group: str | None
    prompt_ids: list[int]
    encoded: Encoded
    conversation: Conversation

    @property
    def asked(self) -> list[dict[str, Any]]:
        """The messages before the answer."""
        return self.conversation.messages[: self.conversation.last_answer]

    @property
    def end_of_turn(self) -> int:
        """The token that ends the answer."""
        pairs = zip(self.encoded.input_ids, self.encoded.supervised, strict=True)
        return [token for token, supervised in pairs if supervised][-1]


def questions(
    tokenizer: Any, conversations: Sequence[Conversation], *, by: str | None = None
) -> list[Question]:
    """Conversations as questions under a tokenizer's chat template.

    Args:
        tokenizer: with a chat template.
        conversations: each with at least one message before its last assistant turn.
        by: field of the data rows that names the group.

    Raises:
        InputError: a conversation that asks nothing, a template that fails, or no row with `by`.
    """
    check_group(conversations, by)
    encoded = encode_all(tokenizer, conversations)
    return [
        _question(tokenizer, conversation, tokens, by)
        for conversation, tokens in zip(conversations, encoded, strict=True)
    ]


def check_group(conversations: Sequence[Conversation], by: str | None) -> None:
    """Refuse a field that no row has.

    Raises:
        InputError: names the fields there are.
    """
    if by is None or any(by in c.fields for c in conversations):
        return
    known = sorted({field for c in conversations for field in c.fields})
    raise InputError(
        f"no row has the field {by!r} that scores are to be broken down by",
        where=conversations[0].where,
        expected=f"one of {', '.join(known)}" if known else "rows with further fields",
    )


def _question(
    tokenizer: Any, conversation: Conversation, encoded: Encoded, by: str | None
) -> Question:
    messages, last = conversation.messages, conversation.last_answer
    if last == 0:
        raise InputError("nothing is asked before the answer", where=conversation.where)
    group = conversation.fields.get(by) if by is not None else None
    return Question(
        prompt=_shown(messages[:last]),
        target=conversation.answer,
        group=None if group is None else str(group),
        prompt_ids=prompt_ids(
            tokenizer, messages[:last], conversation.tools, where=conversation.where
        ),
        encoded=encoded,
        conversation=conversation,
    )


def _shown(messages: Sequence[Mapping[str, Any]]) -> str:
    if len(messages) == 1:
        return str(messages[0]["content"])
    return "\n".join(f"{m['role']}: {m['content']}" for m in messages)
