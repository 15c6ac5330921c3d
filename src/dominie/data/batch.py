"""A micro-batch: its conversations as tensors, and where each of them lies.

What is counted, grouped or looked up by conversation is taken from `Batch.spans`, which stay on
the CPU: read from the tensors it would make the CPU wait for a GPU.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from torch import Tensor

from dominie.data.layout import layout

if TYPE_CHECKING:
    from numpy.typing import NDArray

IGNORED = -100


class Row(Protocol):
    """One tokenised conversation.

    It may have `weights` [n], factors of its tokens, and `shown` [m], see `Span`.
    """

    @property
    def input_ids(self) -> Any:
        """[n] token ids."""

    @property
    def supervised(self) -> Any:
        """[n] whether a token belongs to an assistant turn."""


@dataclass(frozen=True, eq=False)
class Span:
    """Where a conversation lies in a batch and what it holds, in memory of the CPU.

    Attributes:
        row: of the batch.
        start: its first position there.
        source: index of its source.
        input_ids: [n] its tokens.
        taught: [n] whether the next token is supervised.
        shown: [m] the right answer, for a teacher that may read it, if the supervised tokens are
            another one.
    """

    row: int
    start: int
    source: int
    input_ids: NDArray[np.int32]
    taught: NDArray[np.bool_]
    shown: NDArray[np.int32] | None = None

    @property
    def tokens(self) -> int:
        """How many positions it takes."""
        return len(self.input_ids)

    @cached_property
    def supervised(self) -> int:
        """How many of them have a supervised next token."""
        return int(self.taught.sum())


@dataclass(frozen=True, eq=False)
class Batch:
    """Tokens of several conversations, every tensor [B, L]; made by `filled` and `collate`.

    Attributes:
        input_ids: token ids; padding repeats id 0 and is never attended by a real token.
        labels: the *next* token's id where that token is supervised (already shifted), else -100.
        segment_ids: which conversation of its row a token belongs to; padding is a segment of its
            own.
        position_ids: position within the segment.
        source_ids: index of the source a token comes from, -1 on padding.
        spans: its conversations, row by row.
        weights: factor of each position in every term of the loss, in whatever it is compared with
            (the label, the teacher's prediction or its attention); None is 1 everywhere. The
            denominator stays the number of supervised tokens.
    """

    input_ids: Tensor
    labels: Tensor
    segment_ids: Tensor
    position_ids: Tensor
    source_ids: Tensor
    spans: Sequence[Span]
    weights: Tensor | None = None

    @property
    def supervised(self) -> Tensor:
        """[B, L] whether the next token of a position is supervised."""
        return self.labels != IGNORED

    @cached_property
    def positions(self) -> Tensor:
        """[N] the positions whose next token is supervised, ascending, of the B·L."""
        length = self.input_ids.shape[1]
        found = [s.row * length + s.start + np.flatnonzero(s.taught) for s in self.spans]
        return to_device(torch.from_numpy(np.concatenate(found)), self.input_ids.device)

    @cached_property
    def supervised_by_row(self) -> list[int]:
        """[B] how many of each row's positions those are."""
        counts = [0] * len(self.input_ids)
        for span in self.spans:
            counts[span.row] += span.supervised
        return counts

    @cached_property
    def segment_lengths(self) -> list[int]:
        """Positions of the segments of all rows in turn: of its conversations and its padding."""
        by_row: list[list[int]] = [[] for _ in range(len(self.input_ids))]
        for span in self.spans:
            by_row[span.row].append(span.tokens)
        for lengths in by_row:
            if padding := self.input_ids.shape[1] - sum(lengths):
                lengths.append(padding)
        return [length for lengths in by_row for length in lengths if length]

    @property
    def packed(self) -> bool:
        """Whether any row holds several conversations."""
        return len({span.row for span in self.spans}) < len(self.spans)

    def model_inputs(self) -> dict[str, Any]:
        """What the transformer needs, and no mask.

        Unpacked rows are right-padded, so causality alone hides the padding; packed rows restart
        their positions, from which transformers derives the block-diagonal mask.
        """
        inputs: dict[str, Any] = {"input_ids": self.input_ids, "use_cache": False}
        if self.packed:
            inputs["position_ids"] = self.position_ids
        return inputs

    def select(self, rows: Sequence[int]) -> Batch:
        """The batch made of `rows` alone, in the same length."""
        if list(rows) == list(range(len(self.input_ids))):
            return self
        index = to_device(torch.tensor(rows, dtype=torch.long), self.input_ids.device)
        chosen = {name: tensor[index] for name, tensor in self._tensors().items()}
        spans = [
            replace(span, row=place)
            for place, row in enumerate(rows)
            for span in self.spans
            if span.row == row
        ]
        return Batch(**chosen, spans=spans)

    def supervised_by(self, source: int) -> Batch:
        """The batch with the tokens of one source alone to learn from."""
        labels = self.labels.masked_fill(self.source_ids != source, IGNORED)
        spans = [
            span if span.source == source else replace(span, taught=np.zeros_like(span.taught))
            for span in self.spans
        ]
        return replace(self, labels=labels, spans=spans)

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on a device."""
        moved = {name: to_device(tensor, device) for name, tensor in self._tensors().items()}
        return Batch(**moved, spans=self.spans)

    def _tensors(self) -> dict[str, Tensor]:
        found = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "spans"}
        return {name: tensor for name, tensor in found.items() if tensor is not None}

    def as_dict(self) -> dict[str, Any]:
        """A mapping that data loaders can move between devices."""
        return {**self._tensors(), "spans": self.spans}

    @classmethod
    def from_dict(cls, mapping: Mapping[str, Any]) -> Batch:
        """The inverse of `as_dict`; other keys are ignored."""
        return cls(**{f.name: mapping[f.name] for f in fields(cls) if f.name in mapping})


@dataclass(frozen=True)
class Padding:
    """How long the rows of a batch are made.

    Attributes:
        multiple: as the longest of them, rounded up to a multiple of this,
        at_most: but not beyond this, which is as many positions as a model has; None is no bound.
    """

    multiple: int = 1
    at_most: int | None = None

    @classmethod
    def on(cls, device: torch.device, at_most: int | None) -> Padding:
        """On a GPU multiples of 128: kernels are chosen for each shape that has not been seen.

        cuDNN, whose attention PyTorch prefers on Hopper, builds a graph for it in some 30 ms.
        """
        return cls(128 if device.type == "cuda" else 1, at_most)

    def length(self, longest: int) -> int:
        """Positions of each row, given the tokens of the longest."""
        rounded = -(-longest // self.multiple) * self.multiple
        return rounded if self.at_most is None else max(longest, min(rounded, self.at_most))


def to_device(tensor: Tensor, device: torch.device | str) -> Tensor:
    """A tensor on a device; copied from the CPU to a GPU in its turn, and nobody waits for that."""
    if tensor.device.type == "cpu" and torch.device(device).type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def collate(
    rows: Sequence[tuple[int, Row]],
    *,
    routes: Sequence[int] | None = None,
    pack_to: int | None = None,
    padding: Padding | None = None,
) -> Batch:
    """Lay (source index, tokenised conversation) pairs out as one batch.

    Args:
        rows: the conversations with the index of their source.
        routes: route of each source. Conversations of different routes never share a row, so that
            a row has one teacher.
        pack_to: longest packed row in tokens; None pads one conversation to a row, in order.
        padding: how long rows are made; None is as long as the longest.
    """
    if pack_to is None:
        return filled([[row] for row in rows], padding)
    lengths = [len(row.input_ids) for _, row in rows]
    by_row = [routes[source] for source, _ in rows] if routes else None
    (laid,) = layout(lengths, by_row, capacity=pack_to)
    return filled([[rows[i] for i in members] for members in laid], padding)


def filled(rows: Sequence[Sequence[tuple[int, Row]]], padding: Padding | None = None) -> Batch:
    """A batch whose rows hold these conversations, padded to one length.

    Args:
        rows: of each row its (source index, tokenised conversation) pairs.
        padding: how long rows are made; None is as long as the longest.
    """
    longest = max(sum(len(row.input_ids) for _, row in members) for members in rows)
    length = longest if padding is None else padding.length(longest)
    shape = (len(rows), length)
    weighted = any(_weights(row) is not None for members in rows for _, row in members)
    spans: list[Span] = []
    batch = Batch(
        input_ids=torch.zeros(shape, dtype=torch.long),
        labels=torch.full(shape, IGNORED, dtype=torch.long),
        segment_ids=torch.zeros(shape, dtype=torch.long),
        position_ids=torch.zeros(shape, dtype=torch.long),
        source_ids=torch.full(shape, -1, dtype=torch.long),
        spans=spans,
        weights=torch.ones(shape) if weighted else None,
    )
    for b, members in enumerate(rows):
        start = 0
        for segment, (source, row) in enumerate(members):
            stop = start + len(row.input_ids)
            ids = np.asarray(row.input_ids, np.int32)
            taught = np.append(np.asarray(row.supervised, np.bool_)[1:], False)
            spans.append(Span(b, start, source, ids, taught, getattr(row, "shown", None)))
            batch.input_ids[b, start:stop] = torch.from_numpy(ids.astype(np.int64))
            following = np.where(taught[:-1], ids[1:], IGNORED).astype(np.int64)
            batch.labels[b, start : stop - 1] = torch.from_numpy(following)
            batch.segment_ids[b, start:stop] = segment
            batch.position_ids[b, start:stop] = torch.arange(stop - start)
            batch.source_ids[b, start:stop] = source
            if batch.weights is not None and (weights := _weights(row)) is not None:
                batch.weights[b, start : stop - 1] = torch.tensor(weights, dtype=torch.float32)[1:]
            start = stop
        batch.segment_ids[b, start:] = len(members)
        batch.position_ids[b, start:] = torch.arange(length - start)
    return batch


def _weights(row: Row) -> Any:
    """[n] factor of each token of a conversation in the loss; None is 1 for all."""
    return getattr(row, "weights", None)


def joined(batches: Sequence[Batch]) -> Batch:
    """The rows of several batches in one, padded on the right to the longest."""
    length = max(batch.input_ids.shape[1] for batch in batches)
    if any(batch.weights is not None for batch in batches):
        batches = [
            replace(batch, weights=torch.ones_like(batch.labels, dtype=torch.float32))
            if batch.weights is None
            else batch
            for batch in batches
        ]
    longer = [_padded(batch, length)._tensors() for batch in batches]
    rows = {name: torch.cat([tensors[name] for tensors in longer]) for name in longer[0]}
    spans, before = [], 0
    for batch in batches:
        spans += [replace(span, row=before + span.row) for span in batch.spans]
        before += len(batch.input_ids)
    return Batch(**rows, spans=spans)


def _padded(batch: Batch, length: int) -> Batch:
    """The batch with rows of `length`; what is added is a segment of its own."""
    rows, added = len(batch.input_ids), length - batch.input_ids.shape[1]
    if not added:
        return batch

    def extended(tensor: Tensor, by: Tensor | int) -> Tensor:
        more = by if isinstance(by, Tensor) else tensor.new_full((), by)
        return torch.cat([tensor, more.expand(rows, added)], dim=1)

    return Batch(
        input_ids=extended(batch.input_ids, 0),
        labels=extended(batch.labels, IGNORED),
        segment_ids=extended(batch.segment_ids, batch.segment_ids.amax(1, keepdim=True) + 1),
        position_ids=extended(
            batch.position_ids, torch.arange(added, device=batch.position_ids.device)
        ),
        source_ids=extended(batch.source_ids, -1),
        spans=batch.spans,
        weights=None if batch.weights is None else extended(batch.weights, 1),
    )
