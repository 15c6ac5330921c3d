"""Which prompts are trained on and which are held out, decided by the prompt alone.

A prompt is hashed to a number u in [0, 1): below `test_fraction` it is a test prompt, below
`test_fraction + validation_fraction` a validation prompt, else one to train on. Nothing else
enters, neither seed nor order nor source, so that a prompt stays in its split when rows are added,
and lands in the same split in every source of the same fractions.
"""

from __future__ import annotations

import hashlib
import json
import unicodedata
from typing import TYPE_CHECKING, Any, Literal, get_args

from dominie.data.conversations import read_conversations
from dominie.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from dominie.data.conversations import Conversation
    from dominie.data.formats import Message
    from dominie.data.sources import Source

Split = Literal["train", "validation", "test"]
SPLITS: tuple[Split, ...] = get_args(Split)

DIGEST_BYTES = 16
_UNIT_BITS = 53  # what a float holds exactly, so that u is never rounded up to 1


def conversation_digest(conversation: Conversation) -> bytes:
    """Hash of a whole conversation, its messages and tools as they stand."""
    return _digest([conversation.messages, conversation.tools])


def prompt_digest(conversation: Conversation) -> bytes:
    """Hash of the prompt: the tools and the messages that the first answer answers.

    Roles and contents count, with runs of white space as one space, so that a held-out question
    does not come back to training for the sake of a line break. An assistant who speaks before any
    user answers nothing; such an opening is part of the prompt, and where no user speaks at all the
    whole conversation is.
    """
    prompt = [[m["role"], _normalised(m["content"])] for m in _prompt(conversation.messages)]
    return _digest([prompt, conversation.tools])


def split_of_prompt(digest: bytes, source: Source) -> Split:
    """The split of `source` in which the prompt of this hash lies."""
    u = (int.from_bytes(digest[:8], "big") >> (64 - _UNIT_BITS)) / 2**_UNIT_BITS
    if u < source.test_fraction:
        return "test"
    return "validation" if u < source.held_out_fraction else "train"


def held_out_prompts(source: Source) -> set[bytes]:
    """Hashes of the prompts that lie in the validation or the test split of a source."""
    if not source.held_out_fraction:
        return set()
    digests = map(prompt_digest, read_conversations(source))
    return {digest for digest in digests if split_of_prompt(digest, source) != "train"}


def without_duplicates(conversations: Iterable[Conversation]) -> Iterator[Conversation | None]:
    """The conversations in order, with None in the place of each that stood before."""
    seen: set[bytes] = set()
    for conversation in conversations:
        digest = conversation_digest(conversation)
        yield None if digest in seen else conversation
        seen.add(digest)


def read_split(source: Source, split: Split) -> list[Conversation]:
    """One split of a source without its exact duplicates, for evaluation.

    Args:
        source: where to read.
        split: `validation` or `test`; `train` is what the source itself does not hold out, before
            the held-out prompts of other sources are removed from it.

    Raises:
        InputError: for a row that cannot be read, or a split in which nothing lies.
    """
    if split not in SPLITS:
        raise InputError(
            "there is no such split",
            where=f"source {source.name}",
            expected=", ".join(SPLITS),
            found=repr(split),
        )
    chosen = [
        conversation
        for conversation in without_duplicates(read_conversations(source))
        if conversation and split_of_prompt(prompt_digest(conversation), source) == split
    ]
    if not chosen:
        fractions = (
            f"validation_fraction {source.validation_fraction:g}, "
            f"test_fraction {source.test_fraction:g}"
            f"{f', where {source.where}' if source.where else ''}"
        )
        raise InputError(
            f"the {split} split is empty",
            where=f"source {source.name}, path {source.path}",
            expected="at least one conversation",
            found=fractions,
            do=f"raise {split}_fraction, or give more data; 1.0 holds out every conversation"
            if split != "train"
            else "hold out less",
        )
    return chosen


def _prompt(messages: list[Message]) -> list[Message]:
    answering = False
    for position, message in enumerate(messages):
        if message["role"] == "assistant" and answering:
            return messages[:position]
        answering = answering or message["role"] in ("user", "tool")
    return messages


def _normalised(text: str) -> str:
    return " ".join(unicodedata.normalize("NFC", text).split())


def _digest(value: Any) -> bytes:
    text = json.dumps(value, sort_keys=True, ensure_ascii=False, default=str)
    return hashlib.blake2b(text.encode(), digest_size=DIGEST_BYTES).digest()
