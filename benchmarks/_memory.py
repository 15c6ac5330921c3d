"""Peak memory of a piece of work, above what was there before it; and what does not fit."""

from __future__ import annotations

import atexit
import ctypes
import gc
import importlib
import platform
import re
from pathlib import Path

import torch

#: As libraries say it whose failures are no torch.OutOfMemoryError.
_TOO_LARGE = re.compile(
    "out of memory|can.t allocate memory|CU[A-Z]+_STATUS_ALLOC_FAILED|CUBLAS_STATUS_NOT_INITIALIZED"
)


def prepare() -> None:
    """To be called once, after the imports and before any model is made.

    Collections leave the imports' objects alone from then on: each looked at all of them, which
    took a fifth of a second. A GPU's last twentieth stays free for libraries that allocate beside
    torch.
    """
    importlib.import_module("transformers.models.auto.modeling_auto")
    importlib.import_module("transformers.models.mixtral.modeling_mixtral")
    importlib.import_module("transformers.trainer")
    gc.collect()
    gc.freeze()
    atexit.register(gc.unfreeze)  # or what ends with the process is said to leak
    if torch.cuda.is_available():
        torch.cuda.set_per_process_memory_fraction(0.95)


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


def is_too_large(error: BaseException) -> bool:
    """Whether a failure says that memory is short."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and bool(_TOO_LARGE.search(str(error)))


def released() -> None:
    """Give memory back after a failure; to be called outside of its handler."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


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
