"""The output head of a language model: from hidden states to logits."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor

_NARROW = (torch.bfloat16, torch.float16)
# Where a product is a tensor of its own before it gets to its place, it is made in chunks of
# this many elements: 16 MiB of float32, still in cache when it is read again.
_CHUNK_ELEMENTS = 1 << 22


def write_product(a: Tensor, b: Tensor, out: Tensor) -> None:
    """``out = a @ b`` in the precision of ``b``; ``out`` may have another one."""
    a = a.to(b.dtype)
    if _suits_onednn(a, b):
        step = max(1, _CHUNK_ELEMENTS // len(a))
        for chunk, columns in zip(torch.split(out, step, 1), torch.split(b, step, 1), strict=True):
            chunk.copy_(_onednn_product(a, columns))
    elif out.dtype == b.dtype:
        torch.mm(a, b, out=out)
    elif _keeps_accumulator(b, out):
        torch.mm(a, b, out_dtype=torch.float32, out=out)
    else:
        out.copy_(a @ b)


def add_product(
    a: Tensor, b: Tensor, out: Tensor, scale: float = 1.0, *, first: bool = False
) -> None:
    """``out += scale · a @ b``, rounded to the precision of ``out`` and no other.

    The ``first`` product is written over whatever ``out`` holds: it need not be zeroed.
    """
    beta = 0.0 if first else 1.0
    if _keeps_accumulator(b, out):
        torch.addmm(out, a, b, out_dtype=out.dtype, beta=beta, alpha=scale, out=out)
        return
    a, b = a.to(out.dtype), b.to(out.dtype)
    if not _suits_onednn(a, b):
        out.addmm_(a, b, beta=beta, alpha=scale)
        return
    step = max(1, _CHUNK_ELEMENTS // out.shape[1])
    for chunk, rows in zip(torch.split(out, step), torch.split(a, step), strict=True):
        product = _onednn_product(rows, b)
        if first:
            torch.mul(product, scale, out=chunk)
        else:
            chunk.add_(product, alpha=scale)


def _keeps_accumulator(operand: Tensor, out: Tensor) -> bool:
    """Whether the device's product hands over its float32 accumulator unrounded."""
    return out.is_cuda and out.dtype == torch.float32 and operand.dtype in _NARROW


def _suits_onednn(a: Tensor, b: Tensor) -> bool:
    return (
        a.device.type == "cpu"
        and a.dtype == b.dtype == torch.float32
        and a.numel() > 0
        and b.numel() > 0
        and torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    )


def _onednn_product(a: Tensor, b: Tensor) -> Tensor:
    """``a @ b`` by the operator that torch.compile emits for linear layers on a CPU."""
    product: Tensor = torch.ops.mkldnn._linear_pointwise(a, b.t(), None, "none", [], "")
    return product


@dataclass(frozen=True, eq=False)
class Head:
    """A linear map from hidden states to logits, with the variants language models configure.

    ``logits = scale · (hidden · weightᵀ + bias)``, and with a soft-cap c,
    ``c · tanh(logits / c)`` of that (Gemma 2, arXiv 2408.00118, section 2).

    Args:
        weight: [V, D]; need not be a leaf (``W + B·A`` of an adapter, say).
        bias: [V].
        scale: multiplies the logits: Cohere's ``logit_scale``, 1 / Granite's ``logits_scaling``.
        softcap: Gemma's ``final_logit_softcapping``.

    Raises:
        ValueError: a shape or a number makes no head.
    """

    weight: Tensor
    bias: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None

    def __post_init__(self) -> None:
        if self.weight.ndim != 2:
            raise ValueError(
                f"a head's weight is [V, D], found shape {list(self.weight.shape)} "
                "(a sharded weight must be gathered first: run the loss inside the wrapped forward)"
            )
        if self.bias is not None and self.bias.shape != self.weight.shape[:1]:
            raise ValueError(
                f"a head's bias is [V] = [{len(self.weight)}], found {list(self.bias.shape)}"
            )
        if not math.isfinite(self.scale):
            raise ValueError(f"a head's scale is a finite number, found {self.scale}")
        if self.softcap is not None and not (math.isfinite(self.softcap) and self.softcap > 0):
            raise ValueError(f"a head's softcap is a positive number or None, found {self.softcap}")

    @property
    def vocabulary_size(self) -> int:
        """V, padding rows included."""
        return self.weight.shape[0]

    @property
    def width(self) -> int:
        """D, the size of a hidden state."""
        return self.weight.shape[1]

    def reordered(self, ids: Tensor) -> Head:
        """The head whose row i is this head's row ``ids[i]``.

        For a teacher whose vocabulary holds the student's tokens under other ids: pass, for every
        student id, the teacher's id of the same token. Copies the weight: do it once, not per step.

        Args:
            ids: [V'] int64, each in [0, V) and none twice.
        """
        if ids.ndim != 1 or ids.is_floating_point() or len(ids) == 0:
            raise ValueError(f"ids are whole numbers [V'], found {ids.dtype} {list(ids.shape)}")
        if ids.min() < 0 or ids.max() >= self.vocabulary_size or len(torch.unique(ids)) < len(ids):
            raise ValueError(f"ids are distinct numbers in [0, {self.vocabulary_size})")
        ids = ids.to(self.weight.device)
        bias = None if self.bias is None else self.bias[ids]
        return replace(self, weight=self.weight[ids], bias=bias)

    def write_logits(self, hidden: Tensor, out: Tensor) -> None:
        """Write the logits of ``hidden`` [n, D] before the soft-cap to ``out`` [n, V].

        The product runs in the weight's precision; ``out`` may have a wider one.
        """
        write_product(hidden, self.weight.t(), out)
        if self.bias is not None:
            out.add_(self.bias)
        if self.scale != 1.0:
            out.mul_(self.scale)

    def constant(self, precision: torch.dtype | None = None) -> Head:
        """This head without a gradient, its weight in ``precision``; shares memory where it can."""
        weight = self.weight.detach().to(precision or self.weight.dtype)
        return replace(self, weight=weight, bias=None if self.bias is None else self.bias.detach())


def as_head(head: Head | Tensor) -> Head:
    """``head`` itself, or the plain head of a bare weight [V, D]."""
    return head if isinstance(head, Head) else Head(head)
