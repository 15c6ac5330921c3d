"""How long a piece of work takes here, and how fast this device multiplies matrices."""

from __future__ import annotations

import functools
import statistics
import time
from typing import TYPE_CHECKING

import torch
from _results import DEVICE, GPU

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor


def timed(work: Callable[[], Tensor], calls: int = 1) -> tuple[float, float, Tensor]:
    """Seconds and CPU seconds of one call, the mean of so many, and what the last one returned.

    On a GPU seconds are those between two events on it, so that what the host does ahead of it
    does not count.
    """
    if GPU:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        begin.record()
    start = time.perf_counter(), time.process_time()
    for _ in range(calls):
        value = work()
    wall, cpu = time.perf_counter() - start[0], time.process_time() - start[1]
    if GPU:
        end.record()
        end.synchronize()
        wall = begin.elapsed_time(end) / 1000
    return wall / calls, cpu / calls, value


@functools.cache
def matrix_speed() -> float:
    """Operations a second of a large bf16 matrix product; on a CPU of a small fp32 one."""
    size, dtype = (8192, torch.bfloat16) if GPU else (512, torch.float32)
    a, b = (torch.randn(size, size, device=DEVICE, dtype=dtype) for _ in range(2))
    seconds = [timed(lambda: a @ b)[0] for _ in range(8)]
    return 2 * size**3 / statistics.median(seconds[3:])
