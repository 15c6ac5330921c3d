"""Bounds for programs that come with a model: how long they may take, how much they may ask."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import FrameType

SECONDS = 10.0
"""Of processor time for one rendering, which takes milliseconds."""
BYTES = 2**30
"""Of memory for one rendering, beyond what the process has."""
CHARACTERS = 2**26
"""Of one rendering."""


class TookTooLong(Exception):
    """A template did not come to its end."""


@contextlib.contextmanager
def bounded() -> Iterator[None]:
    """Within, Python code may take so much time and memory, and no more.

    Time is kept in the main thread, where a signal can interrupt; memory on Linux.

    Raises:
        TookTooLong: out of time.
        MemoryError: out of memory.
    """
    with contextlib.ExitStack() as stack:
        if threading.current_thread() is threading.main_thread():
            stack.enter_context(_timed())
        stack.enter_context(_sized())
        yield


@contextlib.contextmanager
def _timed() -> Iterator[None]:
    before = signal.signal(signal.SIGVTALRM, _stop)
    signal.setitimer(signal.ITIMER_VIRTUAL, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0.0)
        signal.signal(signal.SIGVTALRM, before)


def _stop(_: int, __: FrameType | None) -> None:
    raise TookTooLong(f"it did not end within {SECONDS:g} s")


@contextlib.contextmanager
def _sized() -> Iterator[None]:
    try:
        import resource

        pages = int(Path("/proc/self/statm").read_bytes().split()[0])
    except (ImportError, OSError, ValueError):  # another system
        yield
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    limit = pages * os.sysconf("SC_PAGE_SIZE") + BYTES
    if soft != resource.RLIM_INFINITY:
        limit = min(limit, soft)
    resource.setrlimit(resource.RLIMIT_AS, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
