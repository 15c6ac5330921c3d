"""Packed rows taken apart: segments of about one length, side by side, as a batch of their own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from dominie.losses.attention.projections import Projections

if TYPE_CHECKING:
    from torch import Tensor

    from dominie.losses.attention.visibility import Visibility


@dataclass(frozen=True)
class Runs:
    """Segments of about one length, each a causal sequence of its own.

    Args:
        batch: [n] the row of the batch that a segment is in.
        positions: [n, l] its positions, ascending; the last is repeated up to the common length.
        weights: [n, l] weights of the rows, zero where repeated.
    """

    batch: Tensor
    positions: Tensor
    weights: Tensor

    def of(self, projections: Projections) -> Projections:
        """Query and key [B, H, L, d] as [n, H, l, d]."""
        query, key = (
            heads_first.transpose(1, 2)[self.batch[:, None], self.positions].transpose(1, 2)
            for heads_first in (projections.query, projections.key)
        )
        return Projections(query, key, projections.scale)

    def add_to(self, total: Tensor, part: Tensor) -> None:
        """Add [n, H, l, d] to the positions of [B, L, H, d] that they came from."""
        index = (self.batch[:, None] * total.shape[1] + self.positions).flatten()
        rows = part.transpose(1, 2).flatten(0, 1).to(total.dtype)
        total.flatten(0, 1).index_add_(0, index, rows)


def runs_of(visible: Visibility) -> list[Runs]:
    """Segments with a weighted row, up to that row, those of about one length together."""
    if "runs" not in visible.plans:
        visible.plans["runs"] = _plan(visible)
    plan: list[Runs] = visible.plans["runs"]
    return plan


def _plan(visible: Visibility) -> list[Runs]:
    weights = visible.row_weights
    by_length: dict[int, list[tuple[int, list[int], list[float]]]] = {}
    ids = visible.segment_ids
    for row, row_weights in enumerate(weights.tolist()):
        segments: dict[int, list[int]] = {}
        for position, segment in enumerate(
            [0] * len(row_weights) if ids is None else ids[row].tolist()
        ):
            segments.setdefault(segment, []).append(position)
        for positions in segments.values():
            end = max((n + 1 for n, p in enumerate(positions) if row_weights[p]), default=0)
            if end:
                kept = positions[:end]
                size = _common_length(end)
                padded = kept + [kept[-1]] * (size - end)
                counted = [row_weights[p] for p in kept] + [0.0] * (size - end)
                by_length.setdefault(size, []).append((row, padded, counted))
    device = weights.device
    return [
        Runs(
            torch.tensor([b for b, _, _ in group], device=device),
            torch.tensor([p for _, p, _ in group], device=device),
            torch.tensor([w for _, _, w in group], device=device, dtype=weights.dtype),
        )
        for _, group in sorted(by_length.items())
    ]


def _common_length(length: int) -> int:
    """The length to which a segment is padded, at most an eighth more: fewer, larger calls."""
    step = max(8, 1 << max(0, length.bit_length() - 4))
    return -(-length // step) * step
