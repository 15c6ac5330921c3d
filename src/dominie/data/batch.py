"""Conversations laid out in rows and micro-batches, and a micro-batch as tensors.

A micro-batch is as long as its longest row; the rest of it is padding. So the conversations of a
whole optimiser step are packed at once: their gradient is one sum, whichever of them share a
forward pass. Rows are made about equally long, and rows of about one length go together.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Protocol

import torch
from torch import Tensor

IGNORED = -100


class Row(Protocol):
    """One tokenised conversation; `weights` [n], where it has them, are factors of its tokens."""

    @property
    def input_ids(self) -> Any:
        """[n] token ids."""

    @property
    def supervised(self) -> Any:
        """[n] whether a token belongs to an assistant turn."""


@dataclass(frozen=True)
class Batch:
    """Tokens of several conversations, every tensor [B, L].

    Attributes:
        input_ids: token ids; padding repeats id 0 and is never attended by a real token.
        labels: the *next* token's id where that token is supervised (already shifted), else -100.
        segment_ids: which conversation of its row a token belongs to; padding is a segment of its
            own.
        position_ids: position within the segment.
        source_ids: index of the source a token comes from, -1 on padding.
        packed: whether a row may hold several conversations.
        weights: factor of each position in every term of the loss, in whatever it is compared with
            (the label, the teacher's prediction or its attention); None is 1 everywhere. The
            denominator stays the number of supervised tokens.
    """

    input_ids: Tensor
    labels: Tensor
    segment_ids: Tensor
    position_ids: Tensor
    source_ids: Tensor
    packed: bool = False
    weights: Tensor | None = None

    @property
    def supervised(self) -> Tensor:
        """[B, L] the positions S whose next token is supervised."""
        return self.labels != IGNORED

    def model_inputs(self) -> dict[str, Any]:
        """What the transformer needs, and no mask.

        Unpacked rows are right-padded, so causality alone hides the padding; packed rows restart
        their positions, from which transformers derives the block-diagonal mask.
        """
        inputs: dict[str, Any] = {"input_ids": self.input_ids, "use_cache": False}
        if self.packed:
            inputs["position_ids"] = self.position_ids
        return inputs

    def select(self, rows: Tensor) -> Batch:
        """The batch made of `rows` alone, in the same length."""
        chosen = {name: tensor[rows] for name, tensor in self._tensors().items()}
        return Batch(**chosen, packed=self.packed)

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on a device."""
        moved = {name: tensor.to(device) for name, tensor in self._tensors().items()}
        return Batch(**moved, packed=self.packed)

    def _tensors(self) -> dict[str, Tensor]:
        found = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "packed"}
        return {name: tensor for name, tensor in found.items() if tensor is not None}

    def as_dict(self) -> dict[str, Any]:
        """A mapping that data loaders can move between devices."""
        return {**self._tensors(), "packed": self.packed}

    @classmethod
    def from_dict(cls, mapping: Mapping[str, Any]) -> Batch:
        """The inverse of `as_dict`; other keys are ignored."""
        return cls(**{f.name: mapping[f.name] for f in fields(cls) if f.name in mapping})


def collate(
    rows: Sequence[tuple[int, Row]],
    *,
    routes: Sequence[int] | None = None,
    pack_to: int | None = None,
) -> Batch:
    """Lay (source index, tokenised conversation) pairs out as one batch.

    Args:
        rows: the conversations with the index of their source.
        routes: route of each source. Conversations of different routes never share a row, so that
            a row has one teacher.
        pack_to: longest packed row in tokens; None pads one conversation to a row, in order.
    """
    if pack_to is None:
        return filled([[row] for row in rows], packed=False)
    lengths = [len(row.input_ids) for _, row in rows]
    by_row = [routes[source] for source, _ in rows] if routes else None
    (laid,) = layout(lengths, by_row, capacity=pack_to)
    return filled([[rows[i] for i in members] for members in laid], packed=True)


def filled(rows: Sequence[Sequence[tuple[int, Row]]], *, packed: bool) -> Batch:
    """A batch whose rows hold these conversations, padded to the longest of them.

    Args:
        rows: of each row its (source index, tokenised conversation) pairs.
        packed: whether several may share one.
    """
    length = max(sum(len(row.input_ids) for _, row in members) for members in rows)
    shape = (len(rows), length)
    weighted = any(_weights(row) is not None for members in rows for _, row in members)
    batch = Batch(
        input_ids=torch.zeros(shape, dtype=torch.long),
        labels=torch.full(shape, IGNORED, dtype=torch.long),
        segment_ids=torch.zeros(shape, dtype=torch.long),
        position_ids=torch.zeros(shape, dtype=torch.long),
        source_ids=torch.full(shape, -1, dtype=torch.long),
        weights=torch.ones(shape) if weighted else None,
        packed=packed,
    )
    for b, members in enumerate(rows):
        start = 0
        for segment, (source, row) in enumerate(members):
            stop = start + len(row.input_ids)
            ids = torch.tensor(row.input_ids, dtype=torch.long)
            supervised = torch.tensor(row.supervised, dtype=torch.bool)
            batch.input_ids[b, start:stop] = ids
            batch.labels[b, start : stop - 1] = ids[1:].masked_fill(~supervised[1:], IGNORED)
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
    return Batch(**rows, packed=any(batch.packed for batch in batches))


def _padded(batch: Batch, length: int) -> Batch:
    """The batch with rows of `length`; what is added is a segment of its own."""
    rows, added = len(batch.input_ids), length - batch.input_ids.shape[1]
    if not added:
        return batch

    def extended(tensor: Tensor, by: Tensor | int) -> Tensor:
        more = torch.as_tensor(by, device=tensor.device, dtype=tensor.dtype)
        return torch.cat([tensor, more.expand(rows, added)], dim=1)

    return Batch(
        input_ids=extended(batch.input_ids, 0),
        labels=extended(batch.labels, IGNORED),
        segment_ids=extended(batch.segment_ids, batch.segment_ids.amax(1, keepdim=True) + 1),
        position_ids=extended(batch.position_ids, torch.arange(added)),
        source_ids=extended(batch.source_ids, -1),
        weights=None if batch.weights is None else extended(batch.weights, 1),
        packed=batch.packed,
    )


#: Conversations of each row, rows of each micro-batch.
Layout = list[list[list[int]]]

#: Real tokens of all positions at which no better layout is looked for.
_FULL = 0.98


def layout(
    lengths: Sequence[int],
    routes: Sequence[int] | None = None,
    *,
    micro_batches: int = 1,
    capacity: int | None = None,
) -> Layout:
    """Lay conversations out in rows and rows in micro-batches, with little padding.

    Micro-batches have about equally many rows, and so never more than there are conversations to
    one of them on average, rounded up. Conversations of different routes never share a row, so that
    a row has one teacher, and seldom a micro-batch, so that it has few.

    Args:
        lengths: [n] tokens of each conversation.
        routes: [n] the route of each; None is one for all.
        micro_batches: how many there are to be, at most n.
        capacity: longest row in tokens that several conversations may share; None gives each a row
            of its own.

    Returns:
        Indices of conversations, each of them once.
    """
    by_route: dict[int, list[int]] = {}
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        by_route.setdefault(routes[i] if routes else 0, []).append(i)
    groups = [by_route[route] for route in sorted(by_route)]
    alone = [[[i] for i in group] for group in groups]
    if capacity is None:
        return _distribute(alone, lengths, micro_batches)
    tokens = sum(lengths)
    fewest = max(-(-tokens // (capacity * micro_batches)), -(-len(groups) // micro_batches))
    best, least = _distribute(alone, lengths, micro_batches), float("inf")
    for each in range(fewest, -(-len(lengths) // micro_batches) + 1):
        counts = _row_counts(min(each * micro_batches, len(lengths)), groups, lengths)
        rows = [
            _balanced(group, lengths, count) for group, count in zip(groups, counts, strict=True)
        ]
        if any(_tokens(row, lengths) > capacity for group in rows for row in group if row[1:]):
            continue
        found = _distribute(rows, lengths, micro_batches)
        if (positions := _positions(found, lengths)) < least:
            best, least = found, positions
        if tokens >= _FULL * least:
            break
    return best


def _tokens(row: Sequence[int], lengths: Sequence[int]) -> int:
    return sum(lengths[i] for i in row)


def _positions(found: Layout, lengths: Sequence[int]) -> int:
    """Positions of all micro-batches, padding and all."""
    return sum(len(rows) * max(_tokens(row, lengths) for row in rows) for rows in found)


def _row_counts(rows: int, groups: Sequence[Sequence[int]], lengths: Sequence[int]) -> list[int]:
    """How many of so many rows each group gets, so that none of them is longer than it must be."""
    counts = [1] * len(groups)
    tokens = [_tokens(group, lengths) for group in groups]
    longest = [(-float(total), g) for g, total in enumerate(tokens) if len(groups[g]) > 1]
    heapq.heapify(longest)
    for _ in range(rows - len(groups)):
        _, g = heapq.heappop(longest)
        counts[g] += 1
        if counts[g] < len(groups[g]):
            heapq.heappush(longest, (-tokens[g] / counts[g], g))
    return counts


def _balanced(longest_first: Sequence[int], lengths: Sequence[int], count: int) -> list[list[int]]:
    """So many rows of about one length: each conversation goes to the row with fewest tokens."""
    rows: list[list[int]] = [[] for _ in range(count)]
    emptiest = [(0, r) for r in range(count)]
    for i in longest_first:
        tokens, r = emptiest[0]
        rows[r].append(i)
        heapq.heapreplace(emptiest, (tokens + lengths[i], r))
    return rows


def _distribute(
    groups: Sequence[Sequence[Sequence[int]]], lengths: Sequence[int], micro_batches: int
) -> Layout:
    """Micro-batches of rows of about one length, route after route, the longest first.

    Micro-batches are about equally large, padding counted, so that no rank waits and none holds
    more than it must: the largest is as small as it can be in this order.
    """
    rows: list[tuple[int, list[int]]] = []
    for group in groups:
        rows += sorted(((_tokens(row, lengths), list(row)) for row in group), reverse=True)
    sizes = [tokens for tokens, _ in rows]
    low, high = max(sizes), len(sizes) * max(sizes)
    while low < high:
        middle = (low + high) // 2
        fits = len(_cuts(sizes, middle)) <= micro_batches
        low, high = (low, middle) if fits else (middle + 1, high)
    parts = [rows[start:stop] for start, stop in _cuts(sizes, high)]
    while len(parts) < micro_batches:
        largest = max((p for p in parts if p[1:]), key=lambda p: len(p) * max(p)[0])
        at, half = parts.index(largest), len(largest) // 2
        parts[at : at + 1] = [largest[:half], largest[half:]]
    return [[row for _, row in part] for part in parts]


def _cuts(sizes: Sequence[int], most: int) -> list[tuple[int, int]]:
    """Where rows are cut into micro-batches of at most so many positions: starts and stops."""
    starts, longest = [0], 0
    for r, size in enumerate(sizes):
        longest = max(longest, size)
        if (r - starts[-1] + 1) * longest > most:
            starts.append(r)
            longest = size
    return list(zip(starts, [*starts[1:], len(sizes)], strict=True))
