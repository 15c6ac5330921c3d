"""Token ids of a rendered conversation, which are supervised, and a tokenizer's fingerprint."""

from __future__ import annotations

import hashlib
import json
from contextlib import nullcontext
from itertools import chain
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from dominie.data import chat_template
from dominie.data.assistant_spans import assistant_turns
from dominie.data.chat_template import PROBED, ChatTemplate
from dominie.data.child_processes import memory_limit
from dominie.data.formats import Conversation, parsed_messages

if TYPE_CHECKING:
    from collections.abc import Sequence

    from transformers import PreTrainedTokenizerBase

    from dominie.data.chat_template import Span
    from dominie.data.formats import Message


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """Hash of all that decides the ids of a conversation, wherever the tokenizer was loaded from.

    That is its ids, its merges, normaliser and pre-tokeniser, its added and special tokens, and its
    chat template. Padding and truncation are not part of it: they change with every call, and the
    token that pads is chosen by whoever trains.
    """
    backend: dict[str, Any] = {}
    if getattr(tokenizer, "is_fast", False):
        backend = json.loads(tokenizer.backend_tokenizer.to_str())
        backend.pop("padding", None)
        backend.pop("truncation", None)
    identity = {
        "ids": sorted(tokenizer.get_vocab().items()),
        "added": {
            str(number): token.__getstate__()
            for number, token in tokenizer.added_tokens_decoder.items()
        },
        "special": {
            name: token
            for name, token in tokenizer.special_tokens_map.items()
            if name != "pad_token"
        },
        "template": tokenizer.chat_template,
        "backend": backend,
    }
    text = json.dumps(identity, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


class Row(NamedTuple):
    """A tokenised conversation of n tokens: two lists from `encode`, two arrays from the store.

    Attributes:
        input_ids: [n] token ids, special tokens as the template writes them and no others.
        supervised: [n] whether a token belongs to an assistant turn, with the one that ends it.
    """

    input_ids: Any
    supervised: Any

    def as_arrays(self) -> Row:
        """The same as int32 and bool arrays."""
        return Row(np.asarray(self.input_ids, np.int32), np.asarray(self.supervised, np.bool_))


Encoded = Row  # the name until 0.1


def encode(tokenizer: PreTrainedTokenizerBase, conversation: Conversation) -> Row:
    """The ids of a conversation under the tokenizer's chat template, with the supervised mask.

    The whole text is tokenised once, as it is at inference; a token is supervised if it overlaps an
    assistant turn. Every turn of the assistant counts, not the last alone. What a content has in
    common with the template's own tokens becomes those tokens, as it does at inference.

    Raises:
        InputError: the tokenizer has no chat template or is not a fast one, or the template fails
            on the conversation or does not tell where its turns lie.
    """
    return encode_all(tokenizer, [conversation])[0]


def encode_all(
    tokenizer: PreTrainedTokenizerBase, conversations: Sequence[Conversation]
) -> list[Row]:
    """`encode` for several conversations, which are tokenised in parallel."""
    template = ChatTemplate(tokenizer)
    template.check([(c.messages, c.tools) for c in conversations[:PROBED]])
    with memory_limit(chat_template.BYTES) if chat_template.in_worker else nullcontext():
        turns = [assistant_turns(template, conversation) for conversation in conversations]
    encodings = tokenizer(
        [text for text, _ in turns],
        add_special_tokens=False,
        return_offsets_mapping=True,
        return_attention_mask=False,
        return_token_type_ids=False,
        verbose=False,
    )
    return [
        Row(ids, _supervised(offsets, spans))
        for ids, offsets, (_, spans) in zip(
            encodings["input_ids"], encodings["offset_mapping"], turns, strict=True
        )
    ]


def supervised_spans(
    tokenizer: PreTrainedTokenizerBase,
    messages: list[Message],
    tools: list[dict[str, Any]] | None = None,
    *,
    where: str = "",
) -> tuple[str, list[Span]]:
    """The text that the chat template makes of a conversation, and what of it is trained on.

    A token is trained on if it overlaps one of the spans.

    Args:
        tokenizer: a fast tokenizer with a chat template.
        messages: the conversation, each message with `role` and `content`.
        tools: JSON schemas of the tools on offer.
        where: what an error names as its place.

    Returns:
        The text, and in order the (start, end) of each assistant turn in it: the characters from
        the end of the generation prompt up to and with the end-of-turn token.

    Raises:
        InputError: as `encode` does, or for messages that are none.
    """
    chat = Conversation(parsed_messages(messages, where), tools, where)
    return assistant_turns(ChatTemplate(tokenizer), chat)


def prompt_ids(
    tokenizer: PreTrainedTokenizerBase,
    messages: list[Message],
    tools: list[dict[str, Any]] | None = None,
    *,
    where: str = "",
) -> list[int]:
    """The ids after which the assistant's answer to `messages` is generated.

    Args:
        tokenizer: a fast tokenizer with a chat template.
        messages: the conversation so far.
        tools: JSON schemas of the tools on offer.
        where: what an error names as its place.

    Raises:
        InputError: as `encode` does.
    """
    text = ChatTemplate(tokenizer).text(messages, tools, where=where, generation_prompt=True)
    ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return ids


def ends_of_turn(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The token that ends an assistant's turn under the chat template, if a token of its own does.

    Raises:
        InputError: as `encode` does.
    """
    chat: list[Message] = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
    ]
    encoded = encode(tokenizer, Conversation(chat))
    pairs = zip(encoded.input_ids, encoded.supervised, strict=True)
    last = [token for token, supervised in pairs if supervised][-1]
    return [last] if last in tokenizer.added_tokens_decoder else []


def _supervised(offsets: list[tuple[int, int]], spans: list[Span]) -> list[bool]:
    """[n] which of the tokens at `offsets` overlap one of the spans."""
    flat = np.fromiter(chain.from_iterable(offsets), np.int64, 2 * len(offsets))
    begins, ends = flat.reshape(-1, 2).T
    mask = np.zeros(len(offsets), dtype=np.bool_)
    for start, end in spans:
        mask |= (begins < end) & (ends > start)
    flags: list[bool] = mask.tolist()
    return flags
