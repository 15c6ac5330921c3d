"""The attention divergence in Triton: tiles of scores never leave the chip, memory is O(L).

Three kernels, each owning what it writes, so that nothing is added atomically and results do not
change from run to run. With u the products of one causal score matrix:

* `statistics` (2u): log-sum-exps of both models' rows and, where asked, the divergence itself,
  online, in one walk over the keys that a block of rows sees;
* `query_gradient` (3u): the same walk, ``scale · w · Σ_j (P^s − P^t)_ij k_j``;
* `key_gradient` (3u): for a block of keys, a walk over the rows that see them.

The gradient of the scores is the difference of two probabilities in float32, rounded once, for the
product that follows: nothing cancels as the student nears the teacher. Blocks of rows without a
weight, keys after a row and keys before all of a block's rows are skipped. Scores are kept in
units of log 2.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch
import triton

from dominie.losses.attention_rows import Projections, Visibility
from dominie.losses.triton_attention_blocks import KERNELS, Blocks, Shape, blocks_of
from dominie.losses.triton_attention_keys import key_gradient
from dominie.losses.triton_attention_rows import query_gradient, statistics

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from torch import Tensor

# mypy: allow-untyped-calls


_LOG2_E = 1.4426950408889634
_UNSEEN = 1.0e30  # the log-sum-exp of a row that is not computed: its probabilities are zero


def value(student: Projections, teacher: Projections, visible: Visibility) -> Tensor:
    """Scalar Σ w · KL, see `dominie.losses.attention_backends.Eager.value`."""
    walk = _Walk.of(student, teacher, visible)
    *_, divergence = walk.statistics(with_divergence=True)
    rows = divergence.view(*student.query.shape[:2], walk.group, -1).mean(2)  # [B, H, L]
    return (rows * visible.row_weights.to(rows.dtype)[:, None]).sum(dtype=torch.float64)


def gradients(
    student: Projections, teacher: Projections, visible: Visibility, factor: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradient of ``factor · value`` with respect to the student's query and key, their dtype."""
    walk = _Walk.of(student, teacher, visible)
    student_lse, teacher_lse, _ = walk.statistics(with_divergence=False)
    # Weights enter a product in the dtype of the inputs: brought near 1, lest float16 overflow.
    weights = (visible.row_weights * factor).float()
    size = weights.abs().amax().clamp_min(torch.finfo(torch.float32).tiny)
    common = (size, student_lse, teacher_lse, (weights / size).contiguous())
    return walk.query_gradient(common), walk.key_gradient(common)


@dataclass(frozen=True)
class _Walk:
    """The arguments that the kernels share, and their launches."""

    student: Projections
    teacher: Projections
    visible: Visibility
    blocks: Mapping[str, Blocks]

    @staticmethod
    def of(student: Projections, teacher: Projections, visible: Visibility) -> _Walk:
        shape, query = Shape.of(student, teacher), student.query
        measure = partial(_milliseconds, shape, query.device)
        blocks = blocks_of(shape, query.device, query.shape[2], measure)
        return _Walk(student, teacher, visible, blocks)

    @property
    def group(self) -> int:
        """Teacher heads that teach one head of the student."""
        return self.teacher.heads // self.student.heads

    def statistics(self, *, with_divergence: bool) -> tuple[Tensor, Tensor, Tensor]:
        """Log-sum-exps of the student [B, H, L], the teacher [B, H_t, L]; divergence [B, H_t, L].

        Rows that are skipped have the log-sum-exp that makes their probabilities zero.
        """
        batch, heads, length, _ = self.student.query.shape
        teacher_heads = self.teacher.heads
        device = self.student.query.device
        student_lse = torch.full((batch, heads, length), _UNSEEN, device=device)
        teacher_lse = torch.full((batch, teacher_heads, length), _UNSEEN, device=device)
        divergence = torch.zeros((batch, teacher_heads, length), device=device)
        count = triton.cdiv(length, self.blocks["statistics"].outer)
        with torch.cuda.device_of(self.student.query):
            statistics[(count, batch * teacher_heads)](
                student_lse,
                teacher_lse,
                divergence,
                self.visible.row_weights.float().contiguous(),
                *self._tensors(),
                **self._constants("statistics"),
                DIVERGENCE=with_divergence,
            )
        return student_lse, teacher_lse, divergence

    def query_gradient(self, common: Sequence[Tensor]) -> Tensor:
        """Gradient of the query [B, H, L, d].

        Args:
            common: scalar by which weights are divided, log-sum-exps of both models, weights.
        """
        batch, heads, length, _ = self.student.query.shape
        count = triton.cdiv(length, self.blocks["query_gradient"].outer)
        out = torch.empty_like(self.student.query, memory_format=torch.contiguous_format)
        with torch.cuda.device_of(out):
            query_gradient[(count, batch * heads)](
                out, *common, *self._tensors(), **self._constants("query_gradient")
            )
        return out

    def key_gradient(self, common: Sequence[Tensor]) -> Tensor:
        """Gradient of the key [B, KV, L, d]; arguments as for the query's."""
        batch, heads, length, _ = self.student.query.shape
        # Query heads that share a key head write apart and are added after: a program for each of
        # them keeps the chip busy where one for each key head would not.
        key_heads = self.student.key.shape[1]
        out = torch.empty_like(
            self.student.query,
            memory_format=torch.contiguous_format,
            dtype=self.student.key.dtype if heads == key_heads else torch.float32,
        )
        count = triton.cdiv(length, self.blocks["key_gradient"].outer)
        with torch.cuda.device_of(out):
            key_gradient[(count, batch * heads)](
                out,
                *common,
                *self._active_rows(),
                *self._tensors(),
                **self._constants("key_gradient"),
            )
        if heads == key_heads:
            return out
        return out.view(batch, key_heads, -1, *out.shape[2:]).sum(2)

    def _active_rows(self) -> tuple[Tensor, Tensor, Tensor]:
        """Last row that sees each key [B, L]; blocks of rows with a weight, and their ranks.

        The second is [B, n], the blocks with a weight first, ascending; the third [B, n + 1], at
        ``m`` the number of such blocks before block ``m``.
        """
        size = self.blocks["key_gradient"].inner
        key = ("triton", size)
        if key not in self.visible.plans:
            weights = self.visible.row_weights
            padded = torch.nn.functional.pad(weights != 0, (0, -weights.shape[1] % size))
            active = padded.unflatten(1, (-1, size)).any(2)
            order = torch.argsort(active, dim=1, descending=True, stable=True)
            ranks = torch.nn.functional.pad(active.cumsum(1), (1, 0))
            self.visible.plans[key] = tuple(
                part.to(torch.int32).contiguous() for part in (self.visible.last, order, ranks)
            )
        plan: tuple[Tensor, Tensor, Tensor] = self.visible.plans[key]
        return plan

    def _tensors(self) -> tuple[Tensor | int | float, ...]:
        """Pointers, strides and sizes, in the order in which every kernel takes them."""
        visible = self.visible
        if "triton" not in visible.plans:
            segments = visible.first if visible.segment_ids is None else visible.segment_ids
            visible.plans["triton"] = tuple(
                part.to(torch.int32).contiguous() for part in (visible.first, segments)
            )
        arguments: list[Tensor | int | float] = [*visible.plans["triton"]]
        for projections in (self.student, self.teacher):
            for tensor in (projections.query, projections.key):
                if tensor.stride(3) != 1:
                    tensor = tensor.contiguous()
                arguments += [tensor, *tensor.stride()[:3]]
        scales = [projections.scale * _LOG2_E for projections in (self.student, self.teacher)]
        return *arguments, self.student.query.shape[2], *scales

    def _constants(self, kernel: str) -> dict[str, int | bool | str]:
        visible, precision = self.visible, self.student.query.dtype
        blocks = self.blocks[kernel]
        widths = [each.query.shape[3] for each in (self.student, self.teacher)]
        return {
            "HEADS": self.student.heads,
            "KEY_HEADS": self.student.key.shape[1],
            "TEACHER_HEADS": self.teacher.heads,
            "TEACHER_KEY_HEADS": self.teacher.key.shape[1],
            "WIDTH": widths[0],
            "PADDED": max(16, triton.next_power_of_2(widths[0])),
            "TEACHER_WIDTH": widths[1],
            "TEACHER_PADDED": max(16, triton.next_power_of_2(widths[1])),
            "OUTER": blocks.outer,
            "INNER": blocks.inner,
            "RAGGED": visible.segment_ids is not None or visible.sliding_window is not None,
            "BROKEN": not visible.unbroken,
            "PRECISION": "tf32x3" if precision == torch.float32 else "tf32",
            "num_warps": blocks.warps,
            "num_stages": blocks.stages,
        }


def trials(
    shape: Shape, device: torch.device, blocks: Blocks, *, heads: int = 128, length: int = 2048
) -> dict[str, Callable[[], object]]:
    """Launches of each kernel on one causal row of so many teacher heads, to time some tiles by."""
    generator = torch.Generator(device).manual_seed(0)  # no draw of the training's

    def drawn(count: int, width: int, dtype: torch.dtype) -> Projections:
        query, key = (
            torch.randn(
                1, length, count, width, generator=generator, device=device, dtype=dtype
            ).transpose(1, 2)
            for _ in range(2)
        )
        return Projections(query, key, width**-0.5)

    visible = Visibility(torch.ones(1, length, device=device))
    learners = heads // shape.group
    walk = _Walk(
        drawn(learners, shape.width, shape.dtype),
        drawn(learners * shape.group, shape.teacher_width, shape.teacher_dtype),
        visible,
        dict.fromkeys(KERNELS, blocks),
    )
    sums = walk.statistics(with_divergence=False)[:2]
    common = (torch.ones((), device=device), *sums, visible.row_weights)
    return {
        "statistics": partial(walk.statistics, with_divergence=False),
        "query_gradient": partial(walk.query_gradient, common),
        "key_gradient": partial(walk.key_gradient, common),
    }


def _milliseconds(shape: Shape, device: torch.device, kernel: str, blocks: Blocks) -> float:
    """The least of three means over ten launches, by the GPU's own clock."""
    with torch.cuda.device(device), torch.no_grad():
        launch = trials(shape, device, blocks)[kernel]
        launch()  # compiles
        means: list[float] = []
        for _ in range(3):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            for _ in range(10):
                launch()
            end.record()
            end.synchronize()
            means.append(start.elapsed_time(end) / 10)
    return min(means)
