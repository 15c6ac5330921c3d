"""The divergence in tiles of rows: only weighted rows are scored, each against the keys it sees.

A tile holds the whole rows of all heads for a handful of positions, in float32, so that its
softmax is an ordinary one, its gradient is P_student − P_teacher without cancellation, and
gradient and value share the scores: four matrix products a tile, where two stock attention calls
and their backward take fourteen. Memory is O(L) beside a fixed work space.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

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


@dataclass(frozen=True)
class Tile:
    """Rows of the batch ``batch``, positions ``rows`` in them, and the keys those can see."""

    batch: slice
    rows: Tensor
    keys: slice
    hidden: tuple[tuple[slice, Tensor], ...]  # columns of the tile, mask [b, 1, R, columns]


def value(student: Projections, teacher: Projections, visible: Visibility) -> Tensor:
    """Scalar Σ w · KL, see `eager.value`."""
    if (apart := _taken_apart(visible)) is not None:
        return torch.stack(
            [value(runs.of(student), runs.of(teacher), inner) for runs, inner in apart]
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
    student: Projections, teacher: Projections, visible: Visibility, factor: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradient of ``factor · value`` with respect to query and key, in float32 or float64."""
    if (apart := _taken_apart(visible)) is not None:
        totals = [
            x.new_zeros(x.transpose(1, 2).shape, dtype=compute_dtype(x.dtype))
            for x in (student.query, student.key)
        ]
        for runs, inner in apart:
            parts = gradients(runs.of(student), runs.of(teacher), inner, factor)
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


def _taken_apart(visible: Visibility) -> list[tuple[Runs, Visibility]] | None:
    """Segments as batches of their own; None where there are none, or a window counts gaps."""
    if visible.segment_ids is None:
        return None
    if "apart" not in visible.plans:
        whole = visible.sliding_window is None or visible.unbroken
        visible.plans["apart"] = (
            [
                (runs, Visibility(runs.weights, None, visible.sliding_window))
                for runs in runs_of(visible)
            ]
            if whole
            else None
        )
    apart: list[tuple[Runs, Visibility]] | None = visible.plans["apart"]
    return apart


def _prepared(projections: Projections) -> Projections:
    """The projections in the dtype of the computation, heads-first in memory, scale kept."""
    dtype = compute_dtype(projections.query.dtype)
    return Projections(
        projections.query.to(dtype), projections.key.to(dtype).contiguous(), projections.scale
    )


def _scores(projections: Projections, tile: Tile) -> Tensor:
    """[b, H, R, K]: scaled scores of a tile, hidden keys very negative."""
    query = projections.query[tile.batch].index_select(2, tile.rows) * projections.scale
    key = projections.key[tile.batch, :, tile.keys].flatten(0, 1)
    batch, heads, rows, width = query.shape
    scores = torch.bmm(query.view(key.shape[0], -1, width), key.transpose(1, 2))
    scores = scores.view(batch, heads, rows, key.shape[1])
    for columns, hidden in tile.hidden:
        scores[..., columns].masked_fill_(hidden, _HIDDEN)
    return scores


def _tiles(visible: Visibility, student_heads: int, teacher_heads: int) -> Iterator[Tile]:
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
        yield Tile(batch, rows, slice(low, high), hidden)


def _plan(
    visible: Visibility, heads: int
) -> list[tuple[slice, Tensor, int, int, tuple[slice, ...]]]:
    """(batch rows, positions, first key, end of keys, columns to be masked) of every tile."""
    weights = visible.row_weights
    length = weights.shape[1]
    budget = (_CPU_TILE if weights.device.type == "cpu" else _GPU_TILE) // heads
    if length * length <= budget:
        return _plan_whole(weights, max(1, budget // (length * length)))
    plan: list[tuple[slice, Tensor, int, int, tuple[slice, ...]]] = []
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


def _plan_whole(
    weights: Tensor, together: int
) -> list[tuple[slice, Tensor, int, int, tuple[slice, ...]]]:
    """The plan of short rows: as many rows of the batch together as a tile holds, all positions."""
    ends = [max((i + 1 for i, w in enumerate(row) if w), default=0) for row in weights.tolist()]
    plan: list[tuple[slice, Tensor, int, int, tuple[slice, ...]]] = []
    for start in range(0, len(ends), together):
        end = max(ends[start : start + together])
        if end:
            index = torch.arange(end, device=weights.device)
            batch = slice(start, start + together)
            plan.append((batch, index, 0, end, (slice(None),)))
    return plan
