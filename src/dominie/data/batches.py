"""A batch of conversations as tensors: padded one to a row, or packed several to a row."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Protocol

import torch
from torch import Tensor

IGNORED = -100


class Row(Protocol):
    """One tokenised conversation."""

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
    """

    input_ids: Tensor
    labels: Tensor
    segment_ids: Tensor
    position_ids: Tensor
    source_ids: Tensor
    packed: bool = False

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
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name != "packed"}

    def as_dict(self) -> dict[str, Any]:
        """A mapping that data loaders can move between devices."""
        return {**self._tensors(), "packed": self.packed}

    @classmethod
    def from_dict(cls, mapping: Mapping[str, Any]) -> Batch:
        """The inverse of `as_dict`; other keys are ignored."""
        return cls(**{f.name: mapping[f.name] for f in fields(cls)})


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
        pack_to: longest packed row in tokens; None pads one conversation to a row.
    """
    if pack_to is None:
        bins = [[i] for i in range(len(rows))]
    else:
        lengths = [len(row.input_ids) for _, row in rows]
        bins = _pack(lengths, [routes[s] if routes else 0 for s, _ in rows], pack_to)
    length = max(sum(len(rows[i][1].input_ids) for i in members) for members in bins)
    shape = (len(bins), length)
    batch = Batch(
        input_ids=torch.zeros(shape, dtype=torch.long),
        labels=torch.full(shape, IGNORED, dtype=torch.long),
        segment_ids=torch.zeros(shape, dtype=torch.long),
        position_ids=torch.zeros(shape, dtype=torch.long),
        source_ids=torch.full(shape, -1, dtype=torch.long),
        packed=pack_to is not None,
    )
    for b, members in enumerate(bins):
        start = 0
        for segment, i in enumerate(members):
            source, row = rows[i]
            stop = start + len(row.input_ids)
            ids = torch.tensor(row.input_ids, dtype=torch.long)
            supervised = torch.tensor(row.supervised, dtype=torch.bool)
            batch.input_ids[b, start:stop] = ids
            batch.labels[b, start : stop - 1] = ids[1:].masked_fill(~supervised[1:], IGNORED)
            batch.segment_ids[b, start:stop] = segment
            batch.position_ids[b, start:stop] = torch.arange(stop - start)
            batch.source_ids[b, start:stop] = source
            start = stop
        batch.segment_ids[b, start:] = len(members)
        batch.position_ids[b, start:] = torch.arange(length - start)
    return batch


def _pack(lengths: Sequence[int], routes: Sequence[int], capacity: int) -> list[list[int]]:
    """Indices of rows that hold one route, at most `capacity` tokens, about equally many.

    First fit, longest first, says how many rows there are. Their batch is as long as the longest of
    them, so that the conversations are then dealt out again, each to the emptiest row.
    """
    fitted = _first_fit(lengths, routes, capacity)
    packed: list[list[int]] = []
    for route in dict.fromkeys(routes[members[0]] for members in fitted):
        bins = [members for members in fitted if routes[members[0]] == route]
        together = sorted((i for members in bins for i in members), key=lambda i: -lengths[i])
        level = _dealt(lengths, together, len(bins))
        fits = all(sum(lengths[i] for i in members) <= capacity for members in level)
        packed += level if fits else bins
    return packed


def _dealt(lengths: Sequence[int], longest_first: Sequence[int], rows: int) -> list[list[int]]:
    """Each conversation to the row with the fewest tokens so far."""
    dealt: list[list[int]] = [[] for _ in range(rows)]
    tokens = [0] * rows
    for i in longest_first:
        emptiest = min(range(rows), key=tokens.__getitem__)
        dealt[emptiest].append(i)
        tokens[emptiest] += lengths[i]
    return dealt


def _first_fit(lengths: Sequence[int], routes: Sequence[int], capacity: int) -> list[list[int]]:
    """First fit, longest first."""
    bins: list[tuple[int, list[int]]] = []
    room: list[int] = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        for b, (route, members) in enumerate(bins):
            if route == routes[i] and lengths[i] <= room[b]:
                members.append(i)
                room[b] -= lengths[i]
                break
        else:
            bins.append((routes[i], [i]))
            room.append(capacity - lengths[i])
    return [members for _, members in bins]
