"""How far bf16 attention gradients are from float64; the third table of `attention.py`.

Without a GPU the kernels run in Triton's interpreter: their roundings are real, their time is not.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import torch
from _results import DEVICE

if DEVICE.type == "cpu":
    os.environ.setdefault("TRITON_INTERPRET", "1")

from dominie.losses import attention_divergence

if TYPE_CHECKING:
    from collections.abc import Iterator

    from _results import Row
    from torch import Tensor


def rows(length: int) -> Iterator[Row]:
    """Relative error of bf16 gradients against float64, at several distances from the teacher."""
    if DEVICE.type == "cpu":
        _mend_interpreter()
    generator = torch.Generator().manual_seed(0)
    shape = {"query": (1, 4, length, 64), "key": (1, 2, length, 64)}
    own = {name: torch.randn(size, generator=generator) for name, size in shape.items()}
    noise = {name: torch.randn(size, generator=generator) for name, size in shape.items()}
    for wanted in (0.2, 0.02, 0.002):
        low, high = 0.0, 4.0
        for _ in range(20):  # the amount of noise that gives the divergence
            middle = (low + high) / 2
            arguments = rounded(own, noise, middle)
            found = exact_gradients(arguments)[0] / (4 * length)
            low, high = (middle, high) if found < wanted else (low, middle)
        divergence, *expected = exact_gradients(arguments)
        for backend in ("tiles", "sdpa", "triton"):
            moved = {
                name: value.to(DEVICE) if isinstance(value, torch.Tensor) else value
                for name, value in arguments.items()
            }
            inputs = [moved[name].requires_grad_() for name in ("student_query", "student_key")]
            loss = attention_divergence(**moved, value=False, backend=backend)
            gradients = [g.double().cpu() for g in torch.autograd.grad(loss, inputs)]
            errors = [
                float((g - e).norm() / e.norm()) for g, e in zip(gradients, expected, strict=True)
            ]
            yield {
                "part": "error",
                "divergence_per_row": float(f"{divergence / (4 * length):.3g}"),
                "backend": backend,
                "query_error_percent": round(100 * errors[0], 3),
                "key_error_percent": round(100 * errors[1], 3),
                "device": DEVICE.type,
            }


def _mend_interpreter() -> None:
    """Triton's interpreter holds bf16 as 16-bit integers, and multiplies matrices of those."""
    import numpy as np
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    def widened(handle: TensorHandle) -> np.ndarray:
        data = handle.data
        is_bf16 = data.dtype == np.uint16
        return (data.astype(np.uint32) << 16).view(np.float32) if is_bf16 else data

    def create_dot(_self, a, b, d, *_) -> TensorHandle:
        product = np.matmul(widened(a), widened(b), dtype=d.data.dtype)
        return TensorHandle(product + d.data, d.dtype.scalar)

    InterpreterBuilder.create_dot = create_dot


def rounded(own: dict[str, Tensor], noise: dict[str, Tensor], amount: float) -> Row:
    """bf16 arguments: a student, and a teacher that differs from it by some noise."""
    taught = {name: own[name] + amount * noise[name] for name in own}
    arguments = {f"student_{name}": tensor.bfloat16() for name, tensor in own.items()}
    arguments |= {f"teacher_{name}": tensor.bfloat16() for name, tensor in taught.items()}
    weights = torch.ones(1, own["query"].shape[2])
    return arguments | {"row_weights": weights, "student_scale": 0.125, "teacher_scale": 0.125}


def exact_gradients(arguments: Row) -> tuple[Tensor, Tensor, Tensor]:
    """Divergence and gradients in float64."""
    exact = {
        name: value.double() if isinstance(value, torch.Tensor) else value
        for name, value in arguments.items()
    }
    inputs = [exact[name].requires_grad_() for name in ("student_query", "student_key")]
    value = attention_divergence(**exact, backend="eager")
    return value.detach(), *torch.autograd.grad(value, inputs)
