"""Peak memory of a piece of work, above what was there before it."""

from __future__ import annotations

import ctypes
import gc
import platform
from pathlib import Path

import torch


def settled() -> int:
    """Bytes allocated now, with the record of the peak set back to them."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    if platform.system() == "Linux":
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
    return resident("VmRSS") or 0


def peak_above(before: int) -> int | None:
    """Bytes by which memory was above `before` at most since `settled`; None if not told."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() - before
    peak = resident("VmHWM")
    return None if peak is None else peak - before


def resident(field: str) -> int | None:
    """Bytes of this process now (VmRSS) or at most (VmHWM), where Linux tells."""
    status = Path("/proc/self/status")
    if not status.exists():
        return None
    line = next(line for line in status.read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024
