"""Matrix products written to, or added to, memory that is already there.

The operands may be narrower than what they are summed into. On a CPU, float32 products go to
oneDNN: ``torch.mm`` calls MKL there, which on AMD's processors takes more than twice as long.
"""

from __future__ import annotations

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


def add_product(a: Tensor, b: Tensor, out: Tensor, scale: float = 1.0) -> None:
    """``out += scale · a @ b``, rounded to the precision of ``out`` and no other."""
    if not _keeps_accumulator(b, out):
        a, b = a.to(out.dtype), b.to(out.dtype)
        if not _suits_onednn(a, b):
            out.addmm_(a, b, alpha=scale)
            return
    step = max(1, _CHUNK_ELEMENTS // out.shape[1])
    for chunk, rows in zip(torch.split(out, step), torch.split(a, step), strict=True):
        product = _onednn_product(rows, b) if out.dtype == b.dtype else _wide_product(rows, b)
        chunk.add_(product, alpha=scale)


def _wide_product(a: Tensor, b: Tensor) -> Tensor:
    """The float32 product of narrow operands."""
    return torch.mm(a, b, out_dtype=torch.float32)


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
