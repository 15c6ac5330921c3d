"""One process at a time: a lock that says whose it is, and goes with its process."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil

from dominie.errors import InputError


@contextlib.contextmanager
def held_alone(path: Path) -> Iterator[None]:
    """Within, no other process holds the lock at `path`.

    The system's lock ends with its process, however that ends. On a file system without locks the
    owner that the file names counts for as long as it lives.

    Raises:
        InputError: another holds it; the message says which, and since when.
        OSError: the file cannot be opened.
    """
    lock = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise _taken(path, _owner(lock)) from None
        except OSError:  # a file system without locks
            owner = _owner(lock)
            if owner and not _is_gone(owner):
                raise _taken(path, owner) from None
        _sign(lock, json.dumps(_own()))
        yield
        _sign(lock, "")
    finally:
        os.close(lock)


def _own() -> dict[str, Any]:
    """Who we are, so that nobody else can be taken for us once we are gone."""
    return {
        "pid": os.getpid(),
        "host": socket.gethostname(),
        "started": psutil.Process().create_time(),
        "since": time.time(),
    }


def _sign(lock: int, text: str) -> None:
    with contextlib.suppress(OSError):  # a full disk; the lock itself holds
        os.ftruncate(lock, 0)
        os.pwrite(lock, text.encode(), 0)


def _owner(lock: int) -> dict[str, Any]:
    """Who signed, empty where nobody did or it cannot be read."""
    try:
        owner: Any = json.loads(os.pread(lock, 4096, 0))
        numbers = {key: float(owner[key]) for key in ("pid", "started", "since")}
        return {**numbers, "host": str(owner["host"])}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def _is_gone(owner: dict[str, Any]) -> bool:
    """Whether an owner is known to live no more; of another host that cannot be known."""
    if owner["host"] != socket.gethostname():
        return False
    try:
        started: float = psutil.Process(int(owner["pid"])).create_time()
    except psutil.Error:
        return True
    return bool(abs(started - owner["started"]) > 1.0)  # another process has got its number


def _taken(path: Path, owner: dict[str, Any]) -> InputError:
    found = None
    if owner:
        age = max(time.time() - owner["since"], 0.0)
        found = f"process {owner['pid']:.0f} on {owner['host']}, for {_duration(age)}"
    return InputError(
        "another dominie is at work in this folder",
        where=str(path.parent),
        found=found,
        do="wait for it, or give this run another name: name=OTHER"
        + ("" if not owner else f" (if it is no more, remove {path})"),
    )


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    minutes = seconds / 60
    return f"{minutes:.0f} min" if minutes < 120 else f"{minutes / 60:.1f} h"
