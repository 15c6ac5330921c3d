"""Hashes of large files, kept as long as the file system vouches that the content is the same."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from dominie.core.io import read_checksummed, write_checksummed

logger = logging.getLogger(__name__)

#: Bytes from which on a file's hash is kept.
LARGE = 2**24
#: Seconds in which a file may change twice under one time: file systems keep coarse ones.
_TICK = 2.0
_MOST = 2000  # hashes that are kept


def content_hashes(files: Sequence[Path]) -> list[str]:
    """Hash the content of each file with BLAKE2b, 32 hexadecimal digits.

    The hash of a large file is kept in the user's cache folder under the file's device, number,
    size and times. The time of the last change of its entry (`ctime`) is among them, which no
    program can set: content that is replaced is read again, whatever its date says.

    Raises:
        OSError: a file cannot be read.
    """
    states = [_state(file) for file in files]
    kept = _read() if any(states) else {}
    unread = [file for file, state in zip(files, states, strict=True) if state not in kept]
    size = sum(file.stat().st_size for file in unread)
    if size > 100 * LARGE:
        logger.warning("reading %.1f GB of weights to know them by content, once", size / 1e9)
    with ThreadPoolExecutor() as pool:  # hashing releases the interpreter lock
        fresh = dict(zip(unread, pool.map(_hash, unread), strict=True))
    found = [
        fresh[file] if file in fresh else kept[state]
        for file, state in zip(files, states, strict=True)
    ]
    new = {
        state: fresh[file]
        for file, state in zip(files, states, strict=True)
        if file in fresh and state and state == _state(file) and _settled(file)
    }
    if new:
        recent = [*kept.items(), *new.items()][-_MOST:]
        with contextlib.suppress(OSError, RuntimeError):  # then they are read again next time
            _place().parent.mkdir(parents=True, exist_ok=True)
            write_checksummed(_place(), dict(recent))
    return found


def _state(file: Path) -> str:
    """What tells a large file's content without reading it; empty for a small one."""
    stat = file.stat()
    if stat.st_size < LARGE:
        return ""
    parts = (stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns)
    return "-".join(map(str, parts))


def _settled(file: Path) -> bool:
    return time.time() - file.stat().st_ctime > _TICK


def _hash(file: Path) -> str:
    with file.open("rb") as stream:
        blake = hashlib.file_digest(stream, lambda: hashlib.blake2b(digest_size=16))
    return blake.hexdigest()


def _read() -> dict[str, str]:
    try:
        return {key: value for key, value in read_checksummed(_place()).items() if key}
    except (OSError, ValueError, RuntimeError):
        return {}


def _place() -> Path:
    home = os.environ.get("XDG_CACHE_HOME")
    return (Path(home) if home else Path.home() / ".cache") / "dominie" / "hashes.json"
