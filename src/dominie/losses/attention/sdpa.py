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
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch.nn import functional

from dominie.losses.attention import tiles
from dominie.losses.attention.projections import Projections, by_group, compute_dtype

if TYPE_CHECKING:
    from torch import Tensor

    from dominie.losses.attention.visibility import Visibility

value = tiles.value

_WINDOW_BLOCK = 256  # least number of queries in one call under a window


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

    def of(self, heads_first: Tensor) -> Tensor:
        """[B, H, L, d] -> [n, H, l, d]."""
        return heads_first.transpose(1, 2)[self.batch[:, None], self.positions].transpose(1, 2)

    def add_to(self, total: Tensor, part: Tensor) -> None:
        """Add [n, H, l, d] to the positions of [B, L, H, d] that they came from."""
        index = (self.batch[:, None] * total.shape[1] + self.positions).flatten()
        rows = part.transpose(1, 2).flatten(0, 1).to(total.dtype)
        total.flatten(0, 1).index_add_(0, index, rows)


def gradients(
    student: Projections, teacher: Projections, visible: Visibility, factor: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradient of ``factor · value`` with respect to the student's query and key."""
    query_gradient, key_gradient = (
        x.new_zeros(x.transpose(1, 2).shape, dtype=compute_dtype(x.dtype))
        for x in (student.query, student.key)
    )
    for runs in _runs(visible):
        parts = _run_gradients(
            Projections(runs.of(student.query), runs.of(student.key), student.scale),
            Projections(runs.of(teacher.query), runs.of(teacher.key), teacher.scale),
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


def _runs(visible: Visibility) -> list[Runs]:
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
