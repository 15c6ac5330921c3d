"""Matrix products whose operands may be narrower than what they are summed into."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor

_NARROW = (torch.bfloat16, torch.float16)


def write_product(a: Tensor, b: Tensor, out: Tensor) -> None:
    """``out = a @ b`` in the precision of ``b``; ``out`` may have another one."""
    a = a.to(b.dtype)
    if out.dtype == b.dtype:
        torch.mm(a, b, out=out)
    elif _keeps_accumulator(b, out):
        torch.mm(a, b, out_dtype=out.dtype, out=out)
    else:
        out.copy_(a @ b)


def add_product(a: Tensor, b: Tensor, out: Tensor, scale: float = 1.0) -> None:
    """``out += scale · a @ b``, the sum never narrower than ``out``."""
    if a.dtype == b.dtype and _keeps_accumulator(b, out):
        torch.addmm(out, a, b, alpha=scale, out_dtype=out.dtype, out=out)
    else:
        out.addmm_(a.to(out.dtype), b.to(out.dtype), alpha=scale)


def _keeps_accumulator(operand: Tensor, out: Tensor) -> bool:
    """Whether the device's product hands over its float32 accumulator unrounded."""
    return out.is_cuda and out.dtype == torch.float32 and operand.dtype in _NARROW
