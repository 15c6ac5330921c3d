"""Backends of the attention divergence in PyTorch: whole maps, tiles of rows, stock attention."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

import torch
from torch.nn import functional

from dominie.losses.attention_rows import (
    Projections,
    Runs,
    Visibility,
    by_group,
    compute_dtype,
    runs_of,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

# Elements of one score tile. 2^18 float32 are 1 MiB: a student's and a teacher's tile stay in the
# second-level cache of a core (flat between 2^16 and 2^19 on two cores of an EPYC; 2^21 is 1.3x
# slower). A GPU wants long launches instead.
_CPU_TILE, _GPU_TILE = 1 << 18, 1 << 26
_HIDDEN = -1e30  # finite: −inf − −inf is NaN where both models hide a key
_WINDOW_BLOCK = 256  # least number of queries in one stock call under a window


class Eager:
    """Whole maps: short, differentiable, quadratic in memory; the oracle of the others."""

    def value(self, student: Projections, teacher: Projections, visible: Visibility) -> Tensor:
        """Scalar Σ_{b,h,i} w_bi · KL(A^t_bhi ‖ A^s_bhi), the mean over groups of teacher heads."""
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
        self, student: Projections, teacher: Projections, visible: Visibility, factor: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Gradient of ``factor · value`` with respect to the student's query and key."""
        with torch.enable_grad():
            query = student.query.detach().requires_grad_()
            key = student.key.detach().requires_grad_()
            total = factor * self.value(Projections(query, key, student.scale), teacher, visible)
            query_gradient, key_gradient = torch.autograd.grad(total, (query, key))
        return query_gradient, key_gradient


class Tiles:
    """Tiles of rows: only weighted rows are scored, each against the keys it sees.

    A tile holds the whole rows of all heads for a handful of positions, in float32, so that its
    softmax is an ordinary one, its gradient is P_student − P_teacher without cancellation, and
    gradient and value share the scores: four matrix products a tile, where two stock attention
    calls and their backward take fourteen. Memory is O(L) beside a fixed work space.
    """

    def value(self, student: Projections, teacher: Projections, visible: Visibility) -> Tensor:
        """Scalar Σ w · KL, see `Eager.value`."""
        if (apart := _taken_apart(visible)) is not None:
            return torch.stack(
                [self.value(runs.of(student), runs.of(teacher), inner) for runs, inner in apart]
                or [torch.zeros((), dtype=torch.float64, device=student.query.device)]
            ).sum()
        student, teacher = _prepared(student), _prepared(teacher)
        total = torch.zeros((), dtype=torch.float64, device=student.query.device)
        for tile in _tiles(visible, student.heads, teacher.heads):
            weights = visible.row_weights[tile.batch].index_select(1, tile.rows)
            log_student = _scores(student, tile).log_softmax(-1).unsqueeze(2)
            log_teacher = by_group(_scores(teacher, tile).log_softmax(-1), student.heads)
            rows = (log_teacher.exp() * (log_teacher - log_student)).sum(-1).mean(2)  # [b, H, R]
            total += (rows * weights[:, None]).sum()
        return total

    def gradients(
        self, student: Projections, teacher: Projections, visible: Visibility, factor: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Gradient of ``factor · value`` with respect to query and key, in float32 or float64."""
        if (apart := _taken_apart(visible)) is not None:
            totals = _zeros_by_position(student)
            for runs, inner in apart:
                parts = self.gradients(runs.of(student), runs.of(teacher), inner, factor)
                for total, part in zip(totals, parts, strict=True):
                    runs.add_to(total, part)
            return totals[0].transpose(1, 2), totals[1].transpose(1, 2)
        student, teacher = _prepared(student), _prepared(teacher)
        query_gradient = torch.zeros_like(student.query)
        key_gradient = torch.zeros_like(student.key)
        key_heads = student.key.shape[1]
        row_weights = (student.scale * factor * visible.row_weights).to(student.query.dtype)
        for tile in _tiles(visible, student.heads, teacher.heads):
            difference = torch.softmax(_scores(student, tile), -1)  # [b, H, R, K]
            taught = torch.softmax(_scores(teacher, tile), -1)
            if teacher.heads != student.heads:
                taught = by_group(taught, student.heads).mean(2)
            difference -= taught
            shape = difference.shape
            weights = row_weights[tile.batch].index_select(1, tile.rows)[:, None, :, None]
            query = student.query[tile.batch].index_select(2, tile.rows) * weights
            # heads that share a key become further rows of one matrix: no expanded keys
            packed = difference.view(shape[0] * key_heads, -1, shape[-1])
            key = student.key[tile.batch, :, tile.keys].flatten(0, 1)
            query_tile = torch.bmm(packed, key).view(query.shape)
            query_gradient[tile.batch, :, tile.rows] = query_tile.mul_(weights)
            key_gradient[tile.batch, :, tile.keys].flatten(0, 1).baddbmm_(
                packed.transpose(1, 2), query.view(shape[0] * key_heads, -1, query.shape[-1])
            )
        return query_gradient, key_gradient


class Sdpa(Tiles):
    """Two stock attention calls: memory O(L), any kernel PyTorch dispatches to.

    With A(q, k, V) = attention and sg = stop-gradient, summed over rows of weight w,
    ``w · scale · q_s · [A(sg q_s, sg k_s, V=k_s) − A(q_t, k_t, V=k_s)]`` has exactly the gradient
    of the divergence, which is linear in the student's scores but for its log-sum-exp: the bracket
    is the gradient with respect to ``scale · q_s``, and the backward of the two calls with respect
    to V gives that of the keys.

    The value is formed in tiles: from the outputs of bf16 kernels it would be a small difference
    of large numbers.
    """

    def gradients(
        self, student: Projections, teacher: Projections, visible: Visibility, factor: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Gradient of ``factor · value`` with respect to the student's query and key."""
        query_gradient, key_gradient = _zeros_by_position(student)
        for runs in runs_of(visible):
            window = visible.sliding_window
            parts = _run_gradients(runs.of(student), runs.of(teacher), runs, window)
            runs.add_to(query_gradient, parts[0])
            runs.add_to(key_gradient, parts[1])
        # in float32, at the end: a loss scale may not fit the kernels' dtype
        return (query_gradient * factor).transpose(1, 2), (key_gradient * factor).transpose(1, 2)


def _zeros_by_position(student: Projections) -> list[Tensor]:
    """Room for the gradients of query and key, [B, L, H, d] each."""
    return [
        x.new_zeros(x.transpose(1, 2).shape, dtype=compute_dtype(x.dtype))
        for x in (student.query, student.key)
    ]


def _log_attention(projections: Projections, hidden: Tensor) -> Tensor:
    """[B, H, L, L]: log-softmax of the scores, very negative (not −inf, whose 0·∞ is NaN)."""
    dtype = compute_dtype(projections.query.dtype)
    query, key = projections.query.to(dtype), projections.key.to(dtype)
    key = key.repeat_interleave(projections.heads // key.shape[1], dim=1)
    scores = projections.scale * query @ key.transpose(-1, -2)
    return scores.masked_fill(hidden, _HIDDEN).log_softmax(-1)


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


@dataclass(frozen=True)
class _Tile:
    """Rows of the batch ``batch``, positions ``rows`` in them, and the keys those can see."""

    batch: slice
    rows: Tensor
    keys: slice
    hidden: tuple[tuple[slice, Tensor], ...]  # columns of the tile, mask [b, 1, R, columns]


#: (batch rows, positions, first key, end of keys, columns to be masked) of every tile.
_Plan: TypeAlias = "list[tuple[slice, Tensor, int, int, tuple[slice, ...]]]"


def _taken_apart(visible: Visibility) -> list[tuple[Runs, Visibility]] | None:
    """Segments as batches of their own; None where there are none, or a window counts gaps."""
    window = visible.sliding_window
    if visible.segment_ids is None or (window is not None and not visible.unbroken):
        return None
    if "apart" not in visible.plans:
        visible.plans["apart"] = [
            (runs, Visibility(runs.weights, None, window)) for runs in runs_of(visible)
        ]
    apart: list[tuple[Runs, Visibility]] = visible.plans["apart"]
    return apart


def _prepared(projections: Projections) -> Projections:
    """The projections in the dtype of the computation, heads-first in memory, scale kept."""
    dtype = compute_dtype(projections.query.dtype)
    return Projections(
        projections.query.to(dtype), projections.key.to(dtype).contiguous(), projections.scale
    )


def _scores(projections: Projections, tile: _Tile) -> Tensor:
    """[b, H, R, K]: scaled scores of a tile, hidden keys very negative."""
    query = projections.query[tile.batch].index_select(2, tile.rows) * projections.scale
    key = projections.key[tile.batch, :, tile.keys].flatten(0, 1)
    batch, heads, rows, width = query.shape
    scores = torch.bmm(query.view(key.shape[0], -1, width), key.transpose(1, 2))
    scores = scores.view(batch, heads, rows, key.shape[1])
    for columns, hidden in tile.hidden:
        scores[..., columns].masked_fill_(hidden, _HIDDEN)
    return scores


def _tiles(visible: Visibility, student_heads: int, teacher_heads: int) -> Iterator[_Tile]:
    """Tiles that hold every weighted row once."""
    heads = max(student_heads, teacher_heads)
    key = ("tiles", heads)
    if key not in visible.plans:
        visible.plans[key] = _plan(visible, heads)
    device = visible.row_weights.device
    for batch, rows, low, high, ragged in visible.plans[key]:
        positions = torch.arange(low, high, device=device)
        hidden = tuple(
            (columns, visible.hidden(batch, rows, positions[columns]).unsqueeze(1))
            for columns in ragged
        )
        yield _Tile(batch, rows, slice(low, high), hidden)


def _plan(visible: Visibility, heads: int) -> _Plan:
    """The tiles of a batch."""
    weights = visible.row_weights
    length = weights.shape[1]
    budget = (_CPU_TILE if weights.device.type == "cpu" else _GPU_TILE) // heads
    if length * length <= budget:
        return _plan_whole(weights, max(1, budget // (length * length)))
    plan: _Plan = []
    whole = [slice(None)]
    for row, (weighted, first) in enumerate(
        zip((weights != 0).tolist(), visible.first.tolist(), strict=True)
    ):
        positions = [position for position, counts in enumerate(weighted) if counts]
        start = 0
        while start < len(positions):
            seen = positions[start] + 1 - first[positions[start]]
            rows = positions[start : start + max(16, min(256, budget // (seen + 32)))]
            low, high = min(first[i] for i in rows), rows[-1] + 1
            left = max(first[i] for i in rows) - low  # columns before it: not seen by all
            right = rows[0] + 1 - low  # columns from it on: after the first row
            ragged = (
                whole
                if not visible.unbroken or left >= right
                else [slice(0, left), slice(right, high - low)]
            )
            columns = tuple(c for c in ragged if c.stop is None or c.start < c.stop)
            index = torch.tensor(rows, device=weights.device)
            plan.append((slice(row, row + 1), index, low, high, columns))
            start += len(rows)
    return plan


def _plan_whole(weights: Tensor, together: int) -> _Plan:
    """The plan of short rows: as many rows of the batch together as a tile holds, all positions."""
    ends = [max((i + 1 for i, w in enumerate(row) if w), default=0) for row in weights.tolist()]
    plan: _Plan = []
    for start in range(0, len(ends), together):
        end = max(ends[start : start + together])
        if end:
            index = torch.arange(end, device=weights.device)
            batch = slice(start, start + together)
            plan.append((batch, index, 0, end, (slice(None),)))
    return plan
