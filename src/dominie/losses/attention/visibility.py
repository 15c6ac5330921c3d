"""Which rows count, and which keys they see."""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from torch import Tensor


class Visibility:
    """Weights of the rows, and what is visible to them: ``0 ≤ i−j < window``, segments agree.

    One object serves every layer of a batch with the same window, so that what it derives, the
    plan of tiles for instance, is derived once.

    Args:
        row_weights: [B, L]; a row of weight zero is not computed where that can be avoided.
        segment_ids: [B, L] integers, or ``None`` where a row of the batch is one segment.
        sliding_window: keys a row sees, itself included; ``None`` for all before it.
    """

    def __init__(
        self,
        row_weights: Tensor,
        segment_ids: Tensor | None = None,
        sliding_window: int | None = None,
    ) -> None:
        length = row_weights.shape[1]
        self.row_weights = row_weights.detach()
        self.segment_ids = segment_ids
        self.sliding_window = (
            sliding_window if sliding_window is not None and sliding_window < length else None
        )
        self.plans: dict[Any, Any] = {}  # what backends derive, under keys of their own

    @cached_property
    def first(self) -> Tensor:
        """[B, L]: a key that a row sees is never before this one."""
        batch, length = self.row_weights.shape
        position = torch.arange(length, device=self.row_weights.device).expand(batch, length)
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
        batch, length = self.row_weights.shape
        position = torch.arange(length, device=self.row_weights.device).expand(batch, length)
        if self.segment_ids is None:
            last = torch.full_like(position, length - 1)
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
        if self.segment_ids is None:
            return True
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
        batch, length = self.row_weights.shape
        position = torch.arange(length, device=self.row_weights.device).expand(batch, length)
        return torch.zeros_like(position).scatter_reduce(
            1, self._segment_rank, position, "amin", include_self=False
        )
