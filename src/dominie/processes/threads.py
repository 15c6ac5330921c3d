"""How many threads torch should use here."""

from __future__ import annotations

import os


def cores() -> int:
    """The cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def use_free_cores(threads: int | None = None) -> int:
    """Give torch as many threads as cores are free, or the number an interrupted stage began with.

    Two threads where one core is busy ran 8 to 10 times slower than one. `OMP_NUM_THREADS` is
    obeyed.

    Returns:
        The number chosen.
    """
    import psutil
    import torch

    if "OMP_NUM_THREADS" in os.environ or torch.cuda.is_available():
        return torch.get_num_threads()
    if threads is None:
        busy = psutil.cpu_percent(interval=0.2) / 100 * (psutil.cpu_count() or 1)
        threads = max(1, round(cores() - busy))
    torch.set_num_threads(threads)
    return threads
