"""A chat template's text as token ids, and which of them belong to the assistant."""

from __future__ import annotations

from itertools import chain
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from dominie.data.rendering import ChatTemplate
from dominie.data.turns import assistant_turns

if TYPE_CHECKING:
    from collections.abc import Sequence

    from transformers import PreTrainedTokenizerBase

    from dominie.data.conversations import Conversation
    from dominie.data.formats import Message
    from dominie.data.rendering import Span


class Encoded(NamedTuple):
    """A tokenised conversation of n tokens.

    Attributes:
        input_ids: [n] token ids, special tokens as the template writes them and no others.
        supervised: [n] whether a token belongs to an assistant turn, with the one that ends it.
    """

    input_ids: list[int]
    supervised: list[bool]


def encode(tokenizer: PreTrainedTokenizerBase, conversation: Conversation) -> Encoded:
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
) -> list[Encoded]:
    """`encode` for several conversations, which are tokenised in parallel."""
    template = ChatTemplate(tokenizer)
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
        Encoded(ids, _supervised(offsets, spans))
        for ids, offsets, (_, spans) in zip(
            encodings["input_ids"], encodings["offset_mapping"], turns, strict=True
        )
    ]


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
    from dominie.data.conversations import Conversation

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
