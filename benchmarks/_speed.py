"""How fast this device multiplies matrices."""

from __future__ import annotations

import functools
import statistics
import time

import torch
from _results import DEVICE, GPU


@functools.cache
def matrix_speed() -> float:
    """Operations a second of a large bf16 matrix product; on a CPU of a small fp32 one."""
    size, dtype = (8192, torch.bfloat16) if GPU else (512, torch.float32)
    a, b = (torch.randn(size, size, device=DEVICE, dtype=dtype) for _ in range(2))
    seconds = []
    for _ in range(8):
        _wait()
        start = time.perf_counter()
        a @ b
        _wait()
        seconds.append(time.perf_counter() - start)
    return 2 * size**3 / statistics.median(seconds[3:])


def _wait() -> None:
    if GPU:
        torch.cuda.synchronize()
