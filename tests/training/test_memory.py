"""Freed memory goes back to the system, now and then."""

from __future__ import annotations

import platform
from types import SimpleNamespace

import psutil
import pytest

from dominie.core import hardware as memory
from dominie.training import callbacks


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="malloc_trim is glibc's")
def test_what_lies_below_a_living_block_is_given_back():
    resident = psutil.Process().memory_info
    blocks = [bytearray(64 * 1024) for _ in range(4_000)]  # 250 MB, too small to be mapped alone
    last = blocks[-1]
    del blocks
    kept = resident().rss
    memory.trim_memory()
    assert kept - resident().rss > 150e6
    assert len(last)


def test_a_system_without_malloc_trim_is_left_alone(monkeypatch):
    memory._malloc_trim.cache_clear()
    monkeypatch.setattr(memory.ctypes, "CDLL", lambda _: object())
    memory.trim_memory()
    memory._malloc_trim.cache_clear()


def test_it_is_done_every_few_steps(monkeypatch):
    steps = []
    callback = callbacks.TrimMemory()
    for step in range(1, 3 * callbacks.TRIM_EVERY + 1):
        monkeypatch.setattr(callbacks, "trim_memory", lambda: steps.append(step))  # noqa: B023
        callback.on_step_end(None, SimpleNamespace(global_step=step), None)
    assert steps == [callbacks.TRIM_EVERY, 2 * callbacks.TRIM_EVERY, 3 * callbacks.TRIM_EVERY]
