"""A batch of conversations as tensors: padded one to a row, or packed several to a row."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from dominie.data.sampling import layout

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
        return Batch(
            **{name: tensor[rows] for name, tensor in self._tensors().items()}, packed=self.packed
        )

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
                batch.weights[b, start : stop - 1] = torch.as_tensor(weights)[1:]
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
        batches = [_weighted(batch) for batch in batches]
    longer = [_padded(batch, length)._tensors() for batch in batches]
    rows = {name: torch.cat([tensors[name] for tensors in longer]) for name in longer[0]}
    return Batch(**rows, packed=any(batch.packed for batch in batches))


def _weighted(batch: Batch) -> Batch:
    """The batch with its weights written out."""
    if batch.weights is not None:
        return batch
    return replace(batch, weights=torch.ones_like(batch.labels, dtype=torch.float32))


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
