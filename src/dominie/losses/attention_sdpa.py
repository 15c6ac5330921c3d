"""The divergence from two stock attention calls: memory O(L), any kernel PyTorch dispatches to.

With A(q, k, V) = attention and sg = stop-gradient, summed over rows of weight w,
``w · scale · q_s · [A(sg q_s, sg k_s, V=k_s) − A(q_t, k_t, V=k_s)]`` has exactly the gradient of
the divergence, which is linear in the student's scores but for its log-sum-exp: the bracket is
the gradient with respect to ``scale · q_s``, and the backward of the two calls with respect to V
gives that of the keys.

The value is formed in `tiles`: from the outputs of bf16 kernels it would be a small difference of
large numbers.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch.nn import functional

from dominie.losses import attention_tiles as tiles
from dominie.losses.attention_rows import Projections, Runs, by_group, compute_dtype, runs_of

if TYPE_CHECKING:
    from torch import Tensor

    from dominie.losses.attention_rows import Visibility

value = tiles.value

_WINDOW_BLOCK = 256  # least number of queries in one call under a window


def gradients(
    student: Projections, teacher: Projections, visible: Visibility, factor: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradient of ``factor · value`` with respect to the student's query and key."""
    query_gradient, key_gradient = (
        x.new_zeros(x.transpose(1, 2).shape, dtype=compute_dtype(x.dtype))
        for x in (student.query, student.key)
    )
    for runs in runs_of(visible):
        parts = _run_gradients(
            runs.of(student),
            runs.of(teacher),
            runs,
            visible.sliding_window,
        )
        runs.add_to(query_gradient, parts[0])
        runs.add_to(key_gradient, parts[1])
    # in float32, at the end: a loss scale may not fit the kernels' dtype
    return (query_gradient * factor).transpose(1, 2), (key_gradient * factor).transpose(1, 2)


def _run_gradients(
    student: Projections, teacher: Projections, runs: Runs, window: int | None
) -> tuple[Tensor, Tensor]:
    """Gradients of segments, [n, H, l, d] and [n, KV, l, d], block by block under a window."""
    length = student.query.shape[2]
    block = length if window is None or window >= length else max(window, _WINDOW_BLOCK)
    query_gradient = torch.empty_like(student.query)
    key_gradient = torch.zeros_like(student.key)
    for start in range(0, length, block):
        rows = slice(start, min(start + block, length))
        keys = slice(max(0, start + 1 - window) if window is not None else 0, rows.stop)
        hidden = None
        if window is not None and window < length:
            here, there = runs.positions[:, rows, None], runs.positions[:, None, keys]
            order = torch.arange(length, device=here.device)
            hidden = (order[None, keys] > order[rows, None]) | (here - there >= window)
        factor = (student.scale * runs.weights[:, None, rows, None]).to(student.query.dtype)
        with torch.enable_grad():
            values = student.key[:, :, keys].detach().requires_grad_()
            taught = _attended(teacher, values, rows, keys, hidden)
            difference = _attended(student, values, rows, keys, hidden)
            difference = difference - by_group(taught, student.heads).mean(2)
            (key_part,) = torch.autograd.grad(
                difference, values, student.query[:, :, rows] * factor
            )
        query_gradient[:, :, rows] = difference.detach() * factor
        key_gradient[:, :, keys] += key_part
    return query_gradient, key_gradient


def _attended(
    projections: Projections, values: Tensor, rows: slice, keys: slice, hidden: Tensor | None
) -> Tensor:
    """[n, H, r, d_v]: stock attention of a model over the student's keys as values."""
    width = values.shape[3]
    query, key = projections.query[:, :, rows], projections.key[:, :, keys]
    query, key = query.to(values.dtype), key.to(values.dtype)
    # the models' key heads need not be grouped alike: expand both to their common multiple
    heads = math.lcm(key.shape[1], values.shape[1])
    key = key.repeat_interleave(heads // key.shape[1], dim=1)
    values = values.repeat_interleave(heads // values.shape[1], dim=1)
    common = max(query.shape[3], width)  # flash kernels want one head size: zeros add no score
    return functional.scaled_dot_product_attention(
        functional.pad(query, (0, common - query.shape[3])),
        functional.pad(key, (0, common - key.shape[3])),
        functional.pad(values, (0, common - width)),
        attn_mask=None if hidden is None else ~hidden[:, None],
        is_causal=hidden is None,
        scale=projections.scale,
        enable_gqa=heads != query.shape[1],
    )[..., :width]
