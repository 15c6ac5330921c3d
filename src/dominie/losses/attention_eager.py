"""The divergence from whole attention maps: short, differentiable, quadratic in memory.

The oracle of the other backends, and the price that they avoid.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from dominie.losses.attention_rows import Projections, by_group, compute_dtype

if TYPE_CHECKING:
    from torch import Tensor

    from dominie.losses.attention_rows import Visibility


def value(student: Projections, teacher: Projections, visible: Visibility) -> Tensor:
    """Scalar Σ_{b,h,i} w_bi · KL(A^t_bhi ‖ A^s_bhi), the mean over each group of teacher heads."""
    heads, length = student.query.shape[1:3]
    everywhere = torch.arange(length, device=student.query.device)
    hidden = visible.hidden(slice(None), everywhere, everywhere)[:, None]  # [b, 1, L, L]
    log_student = _log_attention(student, hidden).unsqueeze(2)  # [B, H, 1, L, L]
    log_teacher = by_group(_log_attention(teacher, hidden), heads)  # [B, H, g, L, L]
    divergence = (log_teacher.exp() * (log_teacher - log_student)).sum(-1).mean(2)  # [B, H, L]
    # a row of weight zero is left out, not multiplied by zero: it may hold anything
    weights = visible.row_weights.to(divergence.dtype)[:, None]
    return torch.where(weights != 0, divergence * weights, 0.0).sum()


def gradients(
    student: Projections, teacher: Projections, visible: Visibility, factor: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradient of ``factor · value`` with respect to the student's query and key."""
    with torch.enable_grad():
        query = student.query.detach().requires_grad_()
        key = student.key.detach().requires_grad_()
        total = factor * value(Projections(query, key, student.scale), teacher, visible)
        query_gradient, key_gradient = torch.autograd.grad(total, (query, key))
    return query_gradient, key_gradient


def _log_attention(projections: Projections, hidden: Tensor) -> Tensor:
    """[B, H, L, L]: log-softmax of the scores, very negative (not −inf, whose 0·∞ is NaN)."""
    dtype = compute_dtype(projections.query.dtype)
    query, key = projections.query.to(dtype), projections.key.to(dtype)
    key = key.repeat_interleave(projections.heads // key.shape[1], dim=1)
    scores = projections.scale * query @ key.transpose(-1, -2)
    return scores.masked_fill(hidden, -1e30).log_softmax(-1)
