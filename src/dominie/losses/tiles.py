"""The walk over tiles of tokens: logits, their scores, their gradient, and the products back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

import torch

from dominie.losses.divergence import LABEL_FACTORS, PerToken, Terms, Tile, Weighted
from dominie.losses.heads import Head, add_product, write_product
from dominie.losses.targets import DenseTarget, SparseTarget

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from torch import Tensor

Scorer: TypeAlias = Callable[[Tile, Terms], None]
"""A backend: fills ``tile.scores`` and, where asked, ``tile.slope``."""

#: Bytes of a GPU that has room for large tiles: A100 of 80 GB, H100 and what came after.
_LARGE = 64e9


@dataclass(frozen=True, eq=False)
class Problem:
    """All of the losses' arguments that no gradient flows to.

    Attributes:
        target: of the divergence, weighted; None where that term is not asked for.
        labels: [N] of the next-token term, likewise.
        scale: the student head's.
        terms: what to compute of every token.
        precision: of the student's matrix products.
        scorer: the backend.
    """

    target: Weighted[DenseTarget | SparseTarget] | None
    labels: Weighted[Tensor] | None
    scale: float
    terms: Terms
    precision: torch.dtype
    scorer: Scorer


@dataclass(frozen=True, eq=False)
class Gradients:
    """Of the weighted sum of both terms; None where not wanted. The head's are float32 sums."""

    hidden: Tensor | None
    weight: Tensor | None
    bias: Tensor | None


def scores_and_gradients(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, problem: Problem, wanted: Sequence[bool]
) -> tuple[PerToken, Gradients]:
    """One pass over the tokens.

    Args:
        hidden: [N, D].
        weight: [V, D].
        bias: [V] or None.
        problem: all else.
        wanted: whether the gradients of hidden, weight and bias are.
    """
    with torch.autocast(hidden.device.type, enabled=False):
        head = Head(weight, bias, problem.scale).constant(problem.precision)
        sums = sum_precision(problem.precision)
        # The first tile's product is written over the head's gradient; without tiles it is zero.
        room = torch.empty_like if len(hidden) else torch.zeros_like
        gradients = Gradients(
            torch.empty_like(hidden) if wanted[0] else None,
            room(weight, dtype=sums) if wanted[1] else None,
            torch.zeros_like(weight[:, 0], dtype=sums) if wanted[2] else None,
        )
        scores = _room_for_scores(hidden.new_empty(len(hidden), dtype=sums), problem)
        for rows, tile in _tiles(hidden, head, problem, scores):
            problem.scorer(tile, problem.terms)
            if problem.terms.gradient:
                _add_tile(gradients, tile.slope, rows, hidden, head)
    return scores, gradients


def sum_precision(products: torch.dtype) -> torch.dtype:
    """That of the logits, the scores and all sums: float32, or float64 for float64 products."""
    return torch.promote_types(products, torch.float32)


def slope_precision(products: torch.dtype, device: torch.device) -> torch.dtype:
    """That of a tile's gradient, as the products that carry it back read it.

    A CPU has no product of narrow operands with a wide sum: there the operands are wide, too.
    """
    return sum_precision(products) if device.type == "cpu" else products


def _room_for_scores(like: Tensor, problem: Problem) -> PerToken:
    compared, labelled = problem.target is not None, problem.labels is not None
    measured = compared and problem.terms.metrics
    factored = labelled and problem.terms.label_kind in LABEL_FACTORS
    wanted = (compared, labelled, measured, measured, factored)
    return PerToken(*(torch.empty_like(like) if is_wanted else None for is_wanted in wanted))


def _tiles(
    hidden: Tensor, head: Head, problem: Problem, scores: PerToken
) -> Iterator[tuple[slice, Tile]]:
    """Every tile with its logits written, all in the same memory."""
    target, labels, count = problem.target, problem.labels, len(hidden)
    dense = target.values if target and isinstance(target.values, DenseTarget) else None
    target_size = dense.head.vocabulary_size if dense else 0
    vocabulary = max(head.vocabulary_size, target_size)
    step = rows_per_tile(count, vocabulary, tile_elements(hidden.device))
    precision = sum_precision(problem.precision)
    student = hidden.new_empty((step, head.vocabulary_size), dtype=precision)
    teacher = hidden.new_empty((step, target_size), dtype=precision)
    narrow = slope_precision(problem.precision, hidden.device)
    slopes = student
    if problem.terms.gradient and narrow != precision:
        slopes = torch.empty_like(student, dtype=narrow)
    for start in range(0, count, step):
        rows = slice(start, min(start + step, count))
        logits = student[: rows.stop - start]
        head.write_logits(hidden[rows], out=logits)
        tile = Tile(
            student=logits,
            slope=slopes[: rows.stop - start],
            target=_compared(target, rows, teacher) if target else None,
            labels=Weighted(labels.values[rows], labels.weights[rows]) if labels else None,
            scores=scores[rows],
        )
        yield rows, tile


def _compared(
    target: Weighted[DenseTarget | SparseTarget], rows: slice, buffer: Tensor
) -> Weighted[Tensor | SparseTarget]:
    """What a tile of student logits is compared with; a teacher's are written to ``buffer``."""
    values, weights = target.values, target.weights[rows]
    if isinstance(values, SparseTarget):
        return Weighted(values[rows], weights)
    logits = buffer[: rows.stop - rows.start]
    values.head.write_logits(values.hidden[rows], out=logits)
    return Weighted(logits, weights)


def _add_tile(gradients: Gradients, slope: Tensor, rows: slice, hidden: Tensor, head: Head) -> None:
    """Carry the gradient of a tile's logits [n, V] on to what the logits were made of."""
    if gradients.hidden is not None:
        write_product(slope, head.weight, out=gradients.hidden[rows])
        if head.scale != 1:
            gradients.hidden[rows] *= head.scale
    if gradients.weight is not None:
        states = hidden[rows].to(head.weight.dtype)
        add_product(slope.t(), states, gradients.weight, head.scale, first=rows.start == 0)
    if gradients.bias is not None:
        gradients.bias.add_(slope.sum(0, dtype=gradients.bias.dtype), alpha=head.scale)


def tile_elements(device: torch.device, memory: float | None = None) -> int:
    """Elements of one tile of logits.

    Large enough that a product over it is as fast as over all tokens, small enough that the tile
    and the teacher's are little beside the gradient of a head, or a tenth of a large GPU.

    Args:
        device: where it is.
        memory: bytes of the device; a GPU is asked unless they are given.
    """
    if device.type == "cpu":
        return 1 << 23
    if memory is None and device.type == "cuda" and torch.cuda.is_available():
        memory = torch.cuda.get_device_properties(device).total_memory
    return 1 << 28 if memory is not None and memory >= _LARGE else 1 << 27


def rows_per_tile(count: int, vocabulary: int, elements: int) -> int:
    """As many tokens as so many elements allow, the last tile no smaller than need be."""
    most = max(16, elements // vocabulary // 16 * 16)
    tiles = max(1, -(-count // most))
    return max(1, -(-count // tiles))
