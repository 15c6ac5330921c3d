"""Memory that a process holds, and memory that was freed, given back to the system."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from typing import Any

import psutil
import torch
from transformers import TrainerCallback

#: Steps between two givings back: one costs milliseconds, and a hundred steps can keep a gigabyte.
EVERY = 10


class GiveBackFreedMemory(TrainerCallback):
    """Every few steps, returns to the system what the C library keeps of freed tensors.

    Batches differ in length, so tensors of ever new sizes are made and freed among longer-lived
    ones, and glibc keeps the holes. A process that trains 3.5M parameters and needs 0.7 GB stood at
    2 GB after 60 steps, and was still growing; with this it stays below 0.9 GB at no cost in time.
    """

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Give back after every `EVERY`-th step."""
        if state.global_step % EVERY == 0:
            give_back_freed_memory()


def give_back_freed_memory() -> None:
    """Return freed memory to the system, where the C library is glibc; elsewhere do nothing."""
    trim = _malloc_trim()
    if trim is not None:
        trim(0)


@functools.cache
def _malloc_trim() -> Callable[[int], int] | None:
    try:
        found = ctypes.CDLL(None).malloc_trim
    except (OSError, AttributeError, TypeError):  # no glibc
        return None
    found.argtypes, found.restype = [ctypes.c_size_t], ctypes.c_int
    return found


def held_memory() -> int:
    """Bytes that this process holds where it computes: the most so far, on a GPU."""
    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated())
    return int(psutil.Process().memory_info().rss)
