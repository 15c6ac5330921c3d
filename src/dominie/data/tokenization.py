"""Tokenises conversations, and keeps their rows in a memory-mapped Arrow file.

The file is an Arrow IPC stream, which `datasets.Dataset.from_file` opens as it is, with the columns
`input_ids` (list of int32), `supervised` (list of bool) and `supervised_tokens` (int32).
"""

from __future__ import annotations

import hashlib
import json
from bisect import bisect_right
from collections.abc import Sequence
from contextlib import nullcontext
from functools import cached_property
from itertools import accumulate, chain
from typing import TYPE_CHECKING, Any, NamedTuple, overload

import numpy as np
import pyarrow as pa

from dominie.data import chat_template
from dominie.data.assistant_spans import assistant_turns
from dominie.data.chat_template import PROBED, ChatTemplate, memory_limit
from dominie.data.formats import Conversation, parsed_messages

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray
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
        "added": {str(n): t.__getstate__() for n, t in tokenizer.added_tokens_decoder.items()},
        "special": {k: v for k, v in tokenizer.special_tokens_map.items() if k != "pad_token"},
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

    Arguments and errors are those of `supervised_spans`, for a conversation so far.
    """
    text = ChatTemplate(tokenizer).text(messages, tools, where=where, generation_prompt=True)
    ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return ids


def ends_of_turn(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The token that ends an assistant's turn under the chat template, if a token of its own does.

    Raises:
        InputError: as `encode` does.
    """
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    row = encode(tokenizer, Conversation(chat))
    last = [token for token, flag in zip(*row, strict=True) if flag][-1]
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


_SCHEMA = pa.schema(
    [
        ("input_ids", pa.list_(pa.int32())),
        ("supervised", pa.list_(pa.bool_())),
        ("supervised_tokens", pa.int32()),
    ]
)
_BATCH_TOKENS = 2**18


class Rows(Sequence[Row]):
    """The rows of a file, read where they lie: opening takes milliseconds, a row microseconds.

    Args:
        path: the Arrow file.
        digest: hash of the content, what it was written with.
        limit: use only so many of the rows, the first.
    """

    def __init__(self, path: Path, digest: str, limit: int | None = None) -> None:
        self.path, self._digest, self._limit = path, digest, limit
        with pa.memory_map(str(path)) as file:
            self._batches = [_Columns(batch) for batch in pa.ipc.open_stream(file) if len(batch)]
        self._ends = list(accumulate(len(batch.counts) for batch in self._batches))
        whole = self._ends[-1] if self._ends else 0
        self._length = whole if limit is None else min(limit, whole)

    def __len__(self) -> int:
        return self._length

    @overload
    def __getitem__(self, index: int) -> Row: ...
    @overload
    def __getitem__(self, index: slice) -> list[Row]: ...
    def __getitem__(self, index: int | slice) -> Row | list[Row]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(self._length))]
        if index < 0:
            index += self._length
        if not 0 <= index < self._length:
            raise IndexError(f"row {index} of {self._length}")
        number = bisect_right(self._ends, index)
        return self._batches[number].row(index - (self._ends[number - 1] if number else 0))

    def __reduce__(self) -> tuple[Any, ...]:
        return Rows, (self.path, self._digest, self._limit)

    def first(self, limit: int | None) -> Rows:
        """The first `limit` rows, or all of them."""
        if limit is None or limit >= self._length:
            return self
        return Rows(self.path, self._digest, limit)

    @property
    def digest(self) -> str:
        """Hash of every token and mask, in order: equal for equal rows, whatever they came from."""
        return self._digest if self._limit is None else f"{self._digest}:{self._length}"

    @cached_property
    def lengths(self) -> NDArray[np.int64]:
        """[rows] tokens in each row."""
        return self._gathered([np.diff(batch.offsets) for batch in self._batches])

    @cached_property
    def supervised_lengths(self) -> NDArray[np.int64]:
        """[rows] tokens of each row that are trained on."""
        return self._gathered([batch.counts for batch in self._batches])

    @cached_property
    def highest_id(self) -> int:
        """The highest token id in the file, -1 where it has no rows."""
        return max((int(batch.ids.max()) for batch in self._batches), default=-1)

    @property
    def supervised_tokens(self) -> int:
        """Tokens that one pass over the rows trains on.

        A token is predicted from those before it, so that the first of a row never counts.
        """
        return int(self.supervised_lengths.sum())

    def _gathered(self, parts: list[NDArray[Any]]) -> NDArray[np.int64]:
        gathered: NDArray[np.int64] = np.concatenate([np.zeros(0, np.int64), *parts])
        return gathered[: self._length]


class _Columns:
    """The columns of one record batch as numpy views of the mapped file."""

    def __init__(self, batch: pa.RecordBatch) -> None:
        ids, flags, counts = batch.columns
        self.ids = ids.values.to_numpy(zero_copy_only=True)
        self.offsets = ids.offsets.to_numpy(zero_copy_only=True)
        self.bits = np.frombuffer(flags.values.buffers()[1], np.uint8)
        self.counts = counts.to_numpy(zero_copy_only=True)

    def row(self, index: int) -> Row:
        start, end = int(self.offsets[index]), int(self.offsets[index + 1])
        bits = np.unpackbits(self.bits[start >> 3 : (end + 7) >> 3], bitorder="little")
        return Row(self.ids[start:end], bits[start & 7 : (start & 7) + end - start].view(np.bool_))


class RowsWriter:
    """Writes rows to a new Arrow file, a record batch of some 2¹⁸ tokens at a time."""

    def __init__(self, path: Path) -> None:
        self.rows = 0
        self._hash = hashlib.blake2b(digest_size=16)
        self._pending: list[tuple[NDArray[np.int32], NDArray[np.bool_]]] = []
        self._tokens = 0
        self._writer = pa.ipc.new_stream(str(path), _SCHEMA)

    def add(self, input_ids: Sequence[int], supervised: Sequence[bool]) -> None:
        """Append a row of [n] ids and [n] flags."""
        ids, flags = np.asarray(input_ids, np.int32), np.asarray(supervised, np.bool_)
        for part in (np.int64(len(ids)), ids, flags):
            self._hash.update(part.tobytes())
        self._pending.append((ids, flags))
        self._tokens += len(ids)
        self.rows += 1
        if self._tokens >= _BATCH_TOKENS:
            self._flush()

    def close(self) -> str:
        """Finish the file, and return the digest of its rows."""
        self._flush()
        self._writer.close()
        return self._hash.hexdigest()

    def _flush(self) -> None:
        if not self._pending:
            return
        ids, flags = zip(*self._pending, strict=True)
        offsets = pa.array(np.cumsum([0, *map(len, ids)]).astype(np.int32))
        columns = [
            pa.ListArray.from_arrays(offsets, pa.array(np.concatenate(ids))),
            pa.ListArray.from_arrays(offsets, pa.array(np.concatenate(flags))),
            pa.array([int(row[1:].sum()) for row in flags], pa.int32()),
        ]
        self._writer.write_batch(pa.RecordBatch.from_arrays(columns, schema=_SCHEMA))
        self._pending, self._tokens = [], 0
