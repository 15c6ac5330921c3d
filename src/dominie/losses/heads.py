"""The output head of a language model: from hidden states to logits."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from dominie.losses.products import write_product

if TYPE_CHECKING:
    from torch import Tensor


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
