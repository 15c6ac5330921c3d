"""What one attention layer attends with: query, key and their scale, after rotary embedding."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

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
