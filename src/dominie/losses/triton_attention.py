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
from typing import TYPE_CHECKING

import torch
import triton

from dominie.losses.triton_attention_keys import key_gradient
from dominie.losses.triton_attention_rows import query_gradient, statistics

if TYPE_CHECKING:
    from torch import Tensor

    from dominie.losses.attention_rows import Projections, Visibility

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
    return walk.gradients(student_lse, teacher_lse, (weights / size).contiguous(), size)


@dataclass(frozen=True)
class _Blocks:
    """Sizes of the tiles: ``outer`` positions stay, ``inner`` positions are walked over."""

    outer: int
    inner: int
    warps: int
    stages: int


#: Bytes of shared memory that a block of threads may have: H100 and H200 227 KiB, A100 163, others
#: 99.
_LARGE, _MEDIUM = 200 * 1024, 160 * 1024


def _blocks(width: int, element_size: int, device: torch.device, *, group: int = 1) -> _Blocks:
    """Tiles whose operands fit registers and shared memory at a head size and dtype.

    `tests/losses/compile_kernels.py` compiles them for Hopper, and tells what each takes: in 16
    bits none spills a register. GPUs with less shared memory get smaller tiles.

    Args:
        width: the larger head size of both models.
        element_size: bytes of the wider dtype of both models.
        device: where the kernels run.
        group: teacher heads to a head of the student; several are read again and again.
    """
    row = width * element_size  # bytes
    shared = _LARGE
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        shared = getattr(properties, "shared_memory_per_block_optin", 0)
    if shared < (_MEDIUM if group == 1 else _LARGE):
        row *= 2
    if row <= 128:  # heads of 64 in bfloat16
        return _Blocks(128, 64, 8, 3)
    if row <= 256:  # heads of 128 in bfloat16
        return _Blocks(128, 64 if group == 1 else 32, 8, 2)
    if row <= 512:
        if element_size == 4:  # three products of tf32 for one want more registers
            return _Blocks(64, 16, 4, 2)
        return _Blocks(128, 32, 8, 2) if shared >= _LARGE and group == 1 else _Blocks(64, 32, 4, 2)
    return _Blocks(32, 16, 4, 1)


@dataclass(frozen=True)
class _Walk:
    """The arguments that the kernels share, and their launches."""

    student: Projections
    teacher: Projections
    visible: Visibility
    blocks: _Blocks

    @staticmethod
    def of(student: Projections, teacher: Projections, visible: Visibility) -> _Walk:
        query = student.query
        width = max(16, query.shape[3], teacher.query.shape[3])
        size = max(query.element_size(), teacher.query.element_size())
        group = teacher.heads // student.heads
        blocks = _blocks(width, size, query.device, group=group)
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
        grid = (triton.cdiv(length, self.blocks.outer), batch * teacher_heads)
        with torch.cuda.device_of(self.student.query):
            statistics[grid](
                student_lse,
                teacher_lse,
                divergence,
                self.visible.row_weights.float().contiguous(),
                *self._tensors(),
                **self._constants(),
                DIVERGENCE=with_divergence,
            )
        return student_lse, teacher_lse, divergence

    def gradients(
        self, student_lse: Tensor, teacher_lse: Tensor, weights: Tensor, size: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Gradients of query [B, H, L, d] and key [B, KV, L, d]; weights are times ``size``."""
        batch, heads, length, _ = self.student.query.shape
        layout = torch.contiguous_format
        by_query = torch.empty_like(self.student.query, memory_format=layout)
        # Query heads that share a key head write apart and are added after: a program for each of
        # them keeps the chip busy where one for each key head would not.
        key_heads = self.student.key.shape[1]
        by_key = torch.empty_like(
            self.student.query,
            memory_format=layout,
            dtype=self.student.key.dtype if heads == key_heads else torch.float32,
        )
        count = triton.cdiv(length, self.blocks.outer)
        common = (size, student_lse, teacher_lse, weights)
        with torch.cuda.device_of(self.student.query):
            query_gradient[(count, batch * heads)](
                by_query, *common, *self._tensors(), **self._constants()
            )
            key_gradient[(count, batch * heads)](
                by_key, *common, *self._active_rows(), *self._tensors(), **self._constants()
            )
        if heads != key_heads:
            by_key = by_key.view(batch, key_heads, -1, *by_key.shape[2:]).sum(2)
        return by_query, by_key

    def _active_rows(self) -> tuple[Tensor, Tensor, Tensor]:
        """Last row that sees each key [B, L]; blocks of rows with a weight, and their ranks.

        The second is [B, n], the blocks with a weight first, ascending; the third [B, n + 1], at
        ``m`` the number of such blocks before block ``m``.
        """
        key = ("triton", self.blocks.inner)
        if key not in self.visible.plans:
            weights = self.visible.row_weights
            size = self.blocks.inner
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

    def _constants(self) -> dict[str, int | bool | str]:
        visible, precision = self.visible, self.student.query.dtype
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
            "OUTER": self.blocks.outer,
            "INNER": self.blocks.inner,
            "RAGGED": visible.segment_ids is not None or visible.sliding_window is not None,
            "BROKEN": not visible.unbroken,
            "PRECISION": "tf32x3" if precision == torch.float32 else "tf32",
            "num_warps": self.blocks.warps,
            "num_stages": self.blocks.stages,
        }
