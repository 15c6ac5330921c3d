"""Atomic writes, checksums, manifests of folders, and lock files."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import socket
import time
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import Any

import psutil

from dominie.core.errors import InputError


def fsync(path: Path) -> None:
    """Flush a file's content, or the entries of a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomic(path: Path, text: str) -> None:
    """Replace a file's text atomically: after a crash it is the old or the new text."""
    scratch = path.with_name(f".{path.name}")
    scratch.write_text(text, encoding="utf-8")
    fsync(scratch)
    scratch.replace(path)


_CHECKSUM = "checksum"


def write_json(path: Path, value: Mapping[str, Any], *, indent: int | None = 1) -> None:
    """Write a JSON object with `write_atomic`."""
    write_atomic(path, json.dumps(value, indent=indent))


def write_checksummed(path: Path, value: Mapping[str, Any], *, indent: int | None = 1) -> None:
    """Write a JSON object whose last key is a checksum of the others."""
    write_json(path, {**value, _CHECKSUM: _checksum(value)}, indent=indent)


def read_checksummed(path: Path) -> dict[str, Any]:
    """Read what `write_checksummed` wrote, without the checksum; older files have none.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is no JSON object, or its checksum differs.
    """
    value: Any = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(value, dict):
        raise ValueError("no JSON object")
    checksum = value.pop(_CHECKSUM, None)
    if checksum is not None and checksum != _checksum(value):
        raise ValueError("not as it was written: its checksum is another")
    return value


def _checksum(value: Mapping[str, Any]) -> str:
    rest = json.loads(json.dumps({k: item for k, item in value.items() if k != _CHECKSUM}))
    text = json.dumps(rest, sort_keys=True)  # of the values as JSON reads them back
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def file_manifest(folder: Path, files: Iterable[Path] | None = None) -> dict[str, dict[str, Any]]:
    """Return `{path: {size, sha256}}` of the files of a folder, or of those given."""
    paths = sorted(folder.rglob("*") if files is None else files)
    found = [path for path in paths if path.is_file()]
    with ThreadPoolExecutor() as pool:  # hashing releases the interpreter lock
        hashes = list(pool.map(file_sha256, found))
    return {
        path.relative_to(folder).as_posix(): {"size": path.stat().st_size, "sha256": sha256}
        for path, sha256 in zip(found, hashes, strict=True)
    }


def manifest_error(folder: Path, files: Mapping[str, Any], *, hashes: bool = True) -> str | None:
    """Compare a folder with its manifest, and describe the first file that differs.

    Args:
        folder: what the manifest's paths are relative to.
        files: the manifest, as `file_manifest` returns it.
        hashes: read and hash the contents, too; else existence and size are compared.

    Returns:
        A phrase that names the file; None if none differs.

    Raises:
        ValueError, KeyError, TypeError, AttributeError: `files` is no manifest.
    """
    for name, each in files.items():
        if not is_inside(name):
            raise ValueError(f"{name} leads out of the folder")
        try:
            size = (folder / name).stat().st_size
        except FileNotFoundError:
            return f"{name} is missing"
        if size != each["size"]:
            return f"{name} is {size} bytes of {each['size']}"
    if not hashes:
        return None
    with ThreadPoolExecutor() as pool:
        found = pool.map(lambda name: file_sha256(folder / name), files)
        for (name, each), sha256 in zip(files.items(), found, strict=True):
            if sha256 != each["sha256"]:
                return f"{name} is not as it was written"
    return None


def is_inside(name: str) -> bool:
    """Return whether a relative path, read from a file, stays within its folder."""
    path = PurePosixPath(name)
    return bool(path.parts) and not path.is_absolute() and ".." not in path.parts


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file's content in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def exclusive_lock(path: Path) -> Iterator[None]:
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
