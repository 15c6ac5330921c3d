"""Query and key of a layer, the rows that count, the keys they see, packed rows by segment."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Projections:
    """Query and key of one layer; row ``i`` of head ``h`` is ``softmax_j(scale · q_i·k_j)``.

    Args:
        query: [B, H, L, d], after rotary embedding.
        key: [B, KV, L, d]; head ``h`` of the query reads key head ``h // (H / KV)``.
        scale: factor of the scores, ``d ** -0.5`` in most models.
        sliding_window: keys a row sees, itself included; ``None`` for all before it.
    """

    query: Tensor
    key: Tensor
    scale: float
    sliding_window: int | None = None

    @property
    def heads(self) -> int:
        """Number of query heads."""
        return self.query.shape[1]

    def detached(self) -> Projections:
        """The same projections, cut from their graph."""
        return Projections(self.query.detach(), self.key.detach(), self.scale, self.sliding_window)

    def rows(self, batch_rows: Tensor) -> Projections:
        """The projections of some rows of the batch."""
        return Projections(
            self.query.index_select(0, batch_rows),
            self.key.index_select(0, batch_rows),
            self.scale,
            self.sliding_window,
        )


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which scores of ``dtype`` inputs are formed: float64 stays, all else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def by_group(per_teacher_head: Tensor, student_heads: int) -> Tensor:
    """[B, H_t, …] -> [B, H_s, g, …]: the teacher's heads beside the student's that they teach."""
    batch, _, *rest = per_teacher_head.shape
    return per_teacher_head.view(batch, student_heads, -1, *rest)


class Visibility:
    """Weights of the rows, and what is visible to them: ``0 ≤ i−j < window``, segments agree.

    One object serves every layer of a batch with the same window, so that what it derives, the
    plan of tiles for instance, is derived once.

    Args:
        row_weights: [B, L]; a row of weight zero is not computed where that can be avoided.
        segment_ids: [B, L] integers, or ``None`` where a row of the batch is one segment.
        sliding_window: keys a row sees, itself included; ``None`` for all before it.
        unbroken: whether every segment is known to be one run; ``None`` finds it out, for which a
            GPU is waited for.
    """

    def __init__(
        self,
        row_weights: Tensor,
        segment_ids: Tensor | None = None,
        sliding_window: int | None = None,
        *,
        unbroken: bool | None = None,
    ) -> None:
        length = row_weights.shape[1]
        self.row_weights = row_weights.detach()
        self.segment_ids = segment_ids
        self.sliding_window = (
            sliding_window if sliding_window is not None and sliding_window < length else None
        )
        self._unbroken = True if segment_ids is None else unbroken
        self.plans: dict[Any, Any] = {}  # what backends derive, under keys of their own

    @cached_property
    def first(self) -> Tensor:
        """[B, L]: a key that a row sees is never before this one."""
        position = self._position
        if self.segment_ids is None:
            first = torch.zeros_like(position)
        else:
            first = torch.gather(self._segment_start, 1, self._segment_rank)
        if self.sliding_window is not None:
            first = torch.maximum(first, position - (self.sliding_window - 1))
        return first

    @cached_property
    def last(self) -> Tensor:
        """[B, L]: a row that sees a key is never after this one."""
        position = self._position
        if self.segment_ids is None:
            last = torch.full_like(position, position.shape[1] - 1)
        else:
            end = torch.zeros_like(position).scatter_reduce(
                1, self._segment_rank, position, "amax", include_self=False
            )
            last = torch.gather(end, 1, self._segment_rank)
        if self.sliding_window is not None:
            last = torch.minimum(last, position + (self.sliding_window - 1))
        return last

    @cached_property
    def unbroken(self) -> bool:
        """Whether every segment is one run, so that ``first ≤ j ≤ i`` says all of visibility."""
        if self._unbroken is not None or self.segment_ids is None:
            return self._unbroken is not False
        ids = self.segment_ids
        changes = (ids[:, 1:] != ids[:, :-1]).sum(1) + 1
        return bool((changes == self._segment_rank.amax(1) + 1).all())

    def hidden(self, batch: slice, rows: Tensor, keys: Tensor) -> Tensor:
        """[b, R, K] (b is 1 where the rows of the batch agree): true where a key is not seen."""
        before_itself = keys[None, :] > rows[:, None]
        if self.segment_ids is None and self.sliding_window is None:
            return before_itself[None]
        first = self.first[batch].index_select(1, rows)
        hidden = before_itself | (keys < first[:, :, None])
        if not self.unbroken and self.segment_ids is not None:
            ids = self.segment_ids[batch]
            hidden |= ids.index_select(1, rows)[:, :, None] != ids.index_select(1, keys)[:, None, :]
        return hidden

    @cached_property
    def _position(self) -> Tensor:
        """[B, L]: each position itself."""
        batch, length = self.row_weights.shape
        return torch.arange(length, device=self.row_weights.device).expand(batch, length)

    @cached_property
    def _segment_rank(self) -> Tensor:
        """[B, L]: segment numbers made dense in each row of the batch: 0, 1, 2 and so on."""
        assert self.segment_ids is not None
        ids = self.segment_ids
        ordered, order = ids.sort(dim=1, stable=True)
        steps = torch.zeros_like(ordered)
        steps[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
        return torch.empty_like(ordered).scatter_(1, order, steps.cumsum(1)).long()

    @cached_property
    def _segment_start(self) -> Tensor:
        """[B, L]: at column r, the first position of the segment of rank r."""
        return torch.zeros_like(self._position).scatter_reduce(
            1, self._segment_rank, self._position, "amin", include_self=False
        )


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
    ids = torch.zeros(weights.shape) if visible.segment_ids is None else visible.segment_ids
    rows = zip(weights.tolist(), ids.tolist(), strict=True)
    for row, (row_weights, row_segments) in enumerate(rows):
        segments: dict[int, list[int]] = {}
        for position, segment in enumerate(row_segments):
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
