"""Tokenised conversations, kept in a memory-mapped Arrow file.

The file is an Arrow IPC stream, which `datasets.Dataset.from_file` opens as it is, with the columns
`input_ids` (list of int32), `supervised` (list of bool), `supervised_tokens` (int32) and `weights`
(list of float32).
"""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from collections.abc import Sequence
from functools import cached_property
from itertools import accumulate
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar, overload

import numpy as np
import pyarrow as pa

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

T = TypeVar("T", bound="np.generic")


class Row(NamedTuple):
    """A tokenised conversation of n tokens: two lists from `encode`, two arrays from the store.

    Attributes:
        input_ids: [n] token ids, special tokens as the template writes them and no others.
        supervised: [n] whether a token belongs to an assistant turn, with the one that ends it.
            Turns of weight 0 are left out.
        weights: [n] how much each token counts, 1 outside these turns; None if all count alike.
    """

    input_ids: Any
    supervised: Any
    weights: Any = None

    def as_arrays(self) -> Row:
        """The same as int32, bool and float32 arrays."""
        weights = None if self.weights is None else np.asarray(self.weights, np.float32)
        ids, flags = np.asarray(self.input_ids, np.int32), np.asarray(self.supervised, np.bool_)
        return Row(ids, flags, weights)

    def first(self, count: int) -> Row:
        """The first `count` tokens of it."""
        return Row(*(part if part is None else part[:count] for part in self))


class Turn(NamedTuple):
    """A turn of the assistant in tokens: what stands before it, and what the data have there."""

    prompt: list[int]
    answer: list[int]


def turn_of(row: Any, draw: float | None = None) -> Turn:
    """The assistant's turn of a conversation that is written anew.

    A row without a supervised token is a prompt as a whole.

    Args:
        row: tokenised.
        draw: from 0 to 1, which of the supervised turns; None is the last one.
    """
    ids, flags = np.asarray(row.input_ids), np.asarray(row.supervised, np.bool_)
    bounds = np.flatnonzero(np.diff(flags, prepend=False, append=False)).reshape(-1, 2)
    if not len(bounds):
        return Turn(ids.tolist(), [])
    begin, end = bounds[-1 if draw is None else int(draw * len(bounds))].tolist()
    return Turn(ids[:begin].tolist(), ids[begin:end].tolist())


_SCHEMA = pa.schema(
    [
        ("input_ids", pa.list_(pa.int32())),
        ("supervised", pa.list_(pa.bool_())),
        ("supervised_tokens", pa.int32()),
        ("weights", pa.list_(pa.float32())),  # empty where all tokens of a row count alike
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
        ids, flags, counts, weights = batch.columns
        self.ids, self.offsets = _view(ids.values, np.int32), _view(ids.offsets, np.int32)
        self.bits = np.frombuffer(flags.values.buffers()[1], np.uint8)
        self.counts = _view(counts, np.int32)
        self.weights = _view(weights.values, np.float32)
        self.weight_offsets = _view(weights.offsets, np.int32)

    def row(self, index: int) -> Row:
        start, end = int(self.offsets[index]), int(self.offsets[index + 1])
        bits = np.unpackbits(self.bits[start >> 3 : (end + 7) >> 3], bitorder="little")
        flags = bits[start & 7 : (start & 7) + end - start].view(np.bool_)
        weights = self.weights[slice(*self.weight_offsets[index : index + 2])]
        return Row(self.ids[start:end], flags, weights if len(weights) else None)


def _view(array: pa.Array, kind: type[T]) -> NDArray[T]:
    """The values of an array where they lie. `to_numpy` would import pandas."""
    _, values = array.buffers()
    if not len(array):
        return np.zeros(0, kind)
    return np.frombuffer(values, kind)[array.offset : array.offset + len(array)]


class RowsWriter:
    """Writes rows to a new Arrow file, a record batch of some 2¹⁸ tokens at a time."""

    def __init__(self, path: Path) -> None:
        self.rows = 0
        self._hash = hashlib.blake2b(digest_size=16)
        self._pending: list[Row] = []
        self._tokens = 0
        self._writer = pa.ipc.new_stream(str(path), _SCHEMA)

    def add(self, row: Row) -> None:
        """Append a row."""
        row = row.as_arrays()
        ids, flags, weights = row
        for part in (np.int64(len(ids)), ids, flags, *([] if weights is None else [weights])):
            self._hash.update(part.tobytes())
        self._pending.append(row)
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
        ids, flags, weights = zip(*self._pending, strict=True)
        given = [np.zeros(0, np.float32) if each is None else each for each in weights]
        columns = [
            _lists(ids),
            _lists(flags),
            pa.array([int(row[1:].sum()) for row in flags], pa.int32()),
            _lists(given),
        ]
        self._writer.write_batch(pa.RecordBatch.from_arrays(columns, schema=_SCHEMA))
        self._pending, self._tokens = [], 0


def _lists(arrays: Sequence[NDArray[Any]]) -> pa.ListArray:
    """A column of lists, one for each array."""
    offsets = pa.array(np.cumsum([0, *map(len, arrays)]).astype(np.int32))
    return pa.ListArray.from_arrays(offsets, pa.array(np.concatenate(arrays)))
