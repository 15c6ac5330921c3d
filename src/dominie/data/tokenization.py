"""Tokenises conversations, with a mask of what the assistant says in them."""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from itertools import chain
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from dominie.core.errors import InputError
from dominie.data import chat_template
from dominie.data.assistant_spans import assistant_turns
from dominie.data.chat_template import ChatTemplate, memory_limit
from dominie.data.columns import split_weights
from dominie.data.formats import Conversation, parsed_messages
from dominie.data.left_out import THOUGHTS, LeftOut, left_out
from dominie.data.row_store import Row

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from dominie.data.chat_template import Span
    from dominie.data.formats import Message


MOST_MESSAGES = 2000
"""Of a conversation; so many take some ten seconds."""
_KNOWN_KEYS = {"role", "content", "tool_calls", "tool_call_id", "id", *THOUGHTS}
_WHOLE_MESSAGE = re.compile(r"\b(message|msg|m)\s*\|\s*(tojson|items|string)\b")


_MORE_AFTER_LAST_TURN = 2
"""After an answer may stand so many tokens more than after another; after a question, more."""


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
        "added": {str(n): t.__getstate__() for n, t in tokenizer.added_tokens_decoder.items()},
        "special": {k: v for k, v in tokenizer.special_tokens_map.items() if k != "pad_token"},
        "template": tokenizer.chat_template,
        "backend": backend,
    }
    text = json.dumps(identity, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


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
    return [row for row, _ in encode_and_tell(tokenizer, conversations)]


def encode_and_tell(
    tokenizer: PreTrainedTokenizerBase, conversations: Sequence[Conversation]
) -> list[tuple[Row, list[LeftOut]]]:
    """`encode_all`, and what the chat template leaves out of each conversation."""
    template = ChatTemplate(tokenizer)
    rows = tokenised(tokenizer, conversations, template=template)
    with memory_limit(chat_template.BYTES) if chat_template.in_worker else nullcontext():
        lost = [
            [*_left_out(template, conversation, row.text), *_unread_keys(template, conversation)]
            for conversation, row in zip(conversations, rows, strict=True)
        ]
    return [
        (row.row(conversation), of_it)
        for row, conversation, of_it in zip(rows, conversations, lost, strict=True)
    ]


class Tokenised(NamedTuple):
    """A conversation's rendering, and its tokens.

    Attributes:
        text: what the chat template makes of the conversation.
        spans: the characters of the assistant's turns.
        input_ids: [n] tokens of the whole text.
        offsets: [n] the characters of each.
    """

    text: str
    spans: list[Span]
    input_ids: list[int]
    offsets: list[tuple[int, int]]

    def row(self, conversation: Conversation) -> Row:
        """The tokens with the supervised mask."""
        weights = _span_weights(self.spans, conversation)
        return Row(self.input_ids, *_supervised(self.offsets, self.spans, weights))


def tokenised(
    tokenizer: PreTrainedTokenizerBase,
    conversations: Sequence[Conversation],
    *,
    template: ChatTemplate | None = None,
) -> list[Tokenised]:
    """Render and tokenise conversations; arguments and errors are those of `encode_all`."""
    template = template or ChatTemplate(tokenizer)
    for conversation in conversations:
        _check_length(conversation)
    with memory_limit(chat_template.BYTES) if chat_template.in_worker else nullcontext():
        turns = [
            _prompt(template, conversation)
            if conversation.prompt
            else assistant_turns(template, conversation)
            for conversation in conversations
        ]
    encodings = tokenizer(
        [text for text, _ in turns],
        add_special_tokens=False,
        return_offsets_mapping=True,
        return_attention_mask=False,
        return_token_type_ids=False,
        verbose=False,
    )
    return [
        Tokenised(text, spans, ids, offsets)
        for (text, spans), ids, offsets in zip(
            turns, encodings["input_ids"], encodings["offset_mapping"], strict=True
        )
    ]


def _prompt(template: ChatTemplate, conversation: Conversation) -> tuple[str, list[Span]]:
    """The rendering of a prompt up to where its answer begins; nothing in it is supervised."""
    messages, tools, where = conversation.messages, conversation.tools, conversation.where
    return template.text(messages, tools, where=where, generation_prompt=True), []


def _left_out(template: ChatTemplate, conversation: Conversation, text: str) -> list[LeftOut]:
    """What the template leaves out of a conversation, which a prompt does not tell."""
    return [] if conversation.prompt else left_out(template, conversation, text)


def _check_length(conversation: Conversation) -> None:
    """Refuse a conversation whose turns would be looked for hours: the time grows as the square."""
    if len(conversation.messages) > MOST_MESSAGES:
        raise InputError(
            "the conversation has too many messages",
            where=conversation.where or None,
            expected=f"at most {MOST_MESSAGES:,}",
            found=f"{len(conversation.messages):,}",
            do="cut it into several rows, of about max_length tokens each",
        )


def _unread_keys(template: ChatTemplate, conversation: Conversation) -> list[LeftOut]:
    """The keys of messages that the chat template does not so much as name."""
    keys = dict.fromkeys(key for message in conversation.messages for key in message)
    unknown = [key for key in keys if key not in _KNOWN_KEYS]
    if not unknown:
        return []
    source = template.tokenizer.get_chat_template(tools=conversation.tools)
    if _WHOLE_MESSAGE.search(source):
        return []
    row = conversation.where.replace("\\", "/").rpartition("/")[2] or "the conversation"
    return [
        LeftOut(f"the key `{key}` of messages", 1, row)
        for key in unknown
        if not re.search(rf"\b{re.escape(key)}\b", source)
    ]


def _span_weights(spans: list[Span], conversation: Conversation) -> list[float]:
    """The weight of the turn in each span; nothing if all count alike.

    Raises:
        InputError: the spans are not one for each turn.
    """
    pairs = zip(conversation.messages, conversation.weights, strict=False)
    weights = [weight for message, weight in pairs if message["role"] == "assistant"]
    if weights and len(weights) != len(spans):
        raise InputError(
            "the messages have weights, and the chat template renders turns in several parts",
            where=conversation.where or None,
            expected=f"one marked part for each of {len(weights)} assistant turns",
            found=f"{len(spans)} parts",
            do="remove the {% generation %} marks from the template, or the weights from the row",
        )
    return weights


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
        the end of the generation prompt up to and with the end-of-turn token. Where a template
        writes none and the next header ends an answer, the text has that token at its end.

    Raises:
        InputError: as `encode` does, or for messages that are none.
    """
    parsed = parsed_messages(messages, where)
    chat = Conversation(parsed, tools, where, weights=split_weights(parsed, where))
    _check_length(chat)
    text, spans = assistant_turns(ChatTemplate(tokenizer), chat)
    weights = _span_weights(spans, chat) or [1.0] * len(spans)
    return text, [span for span, weight in zip(spans, weights, strict=True) if weight > 0]


def prompt_ids(
    tokenizer: PreTrainedTokenizerBase,
    messages: list[Message],
    tools: list[dict[str, Any]] | None = None,
    *,
    where: str = "",
) -> list[int]:
    """The ids after which the assistant's answer to `messages` is generated.

    Arguments and errors are those of `supervised_spans`, for a conversation so far.
    """
    text = ChatTemplate(tokenizer).text(messages, tools, where=where, generation_prompt=True)
    ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return ids


def ends_of_rows(tokenizer: PreTrainedTokenizerBase, rows: Iterable[Any]) -> list[int]:
    """The tokens of their own that end the last turns of rows, the most frequent one first.

    Args:
        tokenizer: of the rows.
        rows: whole conversations. Those that end with a question are passed over, as far as there
            are others: within a conversation a turn may end with another token.
    """
    ends = [  # how many tokens follow the last turn, and its last token
        (len(row.input_ids) - last, int(row.input_ids[last]))
        for row in rows
        for last in np.flatnonzero(row.supervised)[-1:]
    ]
    fewest = min((after for after, _ in ends), default=0)
    found = Counter(token for after, token in ends if after <= fewest + _MORE_AFTER_LAST_TURN)
    return [token for token, _ in found.most_common() if token in tokenizer.added_tokens_decoder]


def _supervised(
    offsets: list[tuple[int, int]], spans: list[Span], span_weights: Sequence[float] = ()
) -> tuple[list[bool], list[float] | None]:
    """[n] which of the tokens at `offsets` overlap one of the spans, and how much they count."""
    flat = np.fromiter(chain.from_iterable(offsets), np.int64, 2 * len(offsets))
    begins, ends = flat.reshape(-1, 2).T
    begins, ends = np.maximum.accumulate(begins), np.maximum.accumulate(ends)  # as they mostly are
    mask = np.zeros(len(offsets), dtype=np.bool_)
    weights = np.ones(len(offsets), dtype=np.float32)
    for (start, end), weight in zip(spans, span_weights or [1.0] * len(spans), strict=True):
        within = slice(np.searchsorted(ends, start, "right"), np.searchsorted(begins, end))
        if weight > 0:
            mask[within], weights[within] = True, weight
    return mask.tolist(), weights.tolist() if (weights != 1).any() else None
