"""Atomic writes, checksums, manifests, lock files, and JSON whose shape is not trusted."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import math
import os
import shutil
import socket
import stat
import time
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

from filelock import FileLock, SoftFileLock, Timeout

from dominie.core.errors import InputError


def fsync(path: Path) -> None:
    """Flush a file's content, or the entries of a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def create(path: Path) -> BinaryIO:
    """Open a new file in the place of what has its name; a link there is replaced, not followed."""
    path.unlink(missing_ok=True)
    return path.open("xb")


def open_append(path: Path) -> BinaryIO:
    """Open a file to add to its end; made if need be.

    Raises:
        InputError: it is a symbolic link, which leads to a file that is somebody else's.
    """
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0)
    try:
        return os.fdopen(os.open(path, flags, 0o666), "ab")
    except OSError as error:
        if not path.is_symlink():
            raise
        raise _linked(path) from error


def _linked(path: Path) -> InputError:
    return InputError(
        "a symbolic link stands where the run writes; nothing was written through it",
        where=str(path),
        expected="a file of the run's own",
        found=f"a link to {path.readlink()}",
        do="find out who made it, and remove it",
    )


def remove(path: Path) -> None:
    """Delete a file, a folder or a link; what a link leads to stays."""
    if path.is_symlink() or path.is_file():
        path.unlink()
    else:
        shutil.rmtree(path, ignore_errors=True)


def empty_folder(path: Path) -> None:
    """Make an empty folder in the place of what has its name; a link there is not followed."""
    remove(path)
    path.mkdir()  # not its parents: a run's folder that has vanished is not made again


def write_atomic(path: Path, text: str) -> None:
    """Replace a file's text atomically: after a crash it is the old or the new text."""
    scratch = path.with_name(f".{path.name}")
    with create(scratch) as file:
        file.write(text.encode())
        file.flush()
        os.fsync(file.fileno())
    scratch.replace(path)


_CHECKSUM = "checksum"


def write_json(path: Path, value: Mapping[str, Any], *, indent: int | None = 1) -> None:
    """Write a JSON object with `write_atomic`."""
    write_atomic(path, json.dumps(value, indent=indent))


def write_checksummed(path: Path, value: Mapping[str, Any], *, indent: int | None = 1) -> None:
    """Write a JSON object whose last key is a checksum of the others."""
    write_json(path, checksummed(value), indent=indent)


def checksummed(value: Mapping[str, Any]) -> dict[str, Any]:
    """Return an object with a last key that is a checksum of the others."""
    return {**value, _CHECKSUM: _checksum(value)}


def read_checksummed(path: Path) -> dict[str, Any]:
    """Read what `write_checksummed` wrote, without the checksum; older files have none.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is no JSON object, or its checksum differs.
    """
    return verify_checksum(read_object_strictly(path))


def read_object_strictly(path: Path, *, most: int | None = None) -> dict[str, Any]:
    """Read a JSON object from a file that is not trusted.

    Args:
        path: of the file.
        most: bytes that it may have; None is any number.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is no regular file, too large, nested too deeply, or no JSON object.
    """
    check_file(path, most)
    try:
        value: Any = json.loads(path.read_text(encoding="utf-8"))
    except RecursionError:
        raise ValueError("brackets nested too deeply") from None
    if not isinstance(value, dict):
        raise ValueError("no JSON object")
    return value


def check_file(path: Path, most: int | None) -> None:
    """Refuse what is no regular file (a pipe would be waited for), or has too many bytes.

    Raises:
        OSError: there is none.
        ValueError: it is refused.
    """
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        raise ValueError("no regular file")
    if most is not None and status.st_size > most:
        raise ValueError(f"{status.st_size:,} bytes, where at most {most:,} can be")


def verify_checksum(value: dict[str, Any]) -> dict[str, Any]:
    """Return the object that `checksummed` was given, from what it returned.

    Raises:
        ValueError: the object is not as it was written.
    """
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


def is_intact(folder: Path, manifest: Path) -> bool:
    """Whether `manifest` can be read, and the files that it lists are as they were written."""
    try:
        return manifest_error(folder, read_checksummed(manifest)["files"]) is None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


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
    """Hold the lock file at `path` in the block; it is free again when its process has ended.

    On a file system without `flock` a second file names the owner, and counts until it is removed
    or the owner has ended on this machine.

    Raises:
        InputError: another process holds it, which the message names, or it is a symbolic link.
        OSError: the file cannot be opened.
    """
    owner = path
    if path.is_symlink():  # taking the lock would empty the file that it leads to
        raise _linked(path)
    try:
        try:
            lock = FileLock(path, fallback_to_soft=False).acquire(blocking=False)
        except OSError as error:
            if error.errno not in (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP):
                raise
            owner = path.with_name(f"{path.name}.owner")
            lock = SoftFileLock(owner).acquire(blocking=False)  # writes process and host
    except Timeout:
        raise _locked(owner) from None
    with lock:
        if owner == path:
            with contextlib.suppress(OSError):  # a full disk; the lock itself holds
                path.write_text(f"{os.getpid()}\n{socket.gethostname()}\n", encoding="utf-8")
        yield


def _locked(path: Path) -> InputError:
    """Return the error that names the owner of a lock: process and host, the file's two lines."""
    found, elsewhere = None, False
    with contextlib.suppress(OSError, ValueError):
        pid, host, *_ = path.read_text(encoding="utf-8").split("\n")
        age = max(time.time() - path.stat().st_mtime, 0.0)
        found = f"process {int(pid)} on {host}, for {_duration(age)}"
        elsewhere = path.suffix == ".owner" and host != socket.gethostname()
    return InputError(
        "another dominie is at work in this folder",
        where=str(path.parent),
        found=found,
        do="wait for it, or give this run another name: name=OTHER"
        + (f" (if it has ended there, remove {path})" if elsewhere else ""),
    )


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    minutes = seconds / 60
    return f"{minutes:.0f} min" if minutes < 120 else f"{minutes / 60:.1f} h"


def mapping(value: object) -> dict[str, Any]:
    """Return the value if it is an object, else an empty one."""
    return value if isinstance(value, dict) else {}


def sequence(value: object) -> list[Any]:
    """Return the value if it is a list, else an empty one."""
    return value if isinstance(value, list) else []


def text(value: object) -> str | None:
    """Return the value if it is a string."""
    return value if isinstance(value, str) else None


def number(value: object) -> float | None:
    """Return the value if it is a number (no boolean), with NaN for one that is not finite."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    try:
        converted = float(value)
    except OverflowError:
        return math.nan
    return converted if math.isfinite(converted) else math.nan


def finite(value: object) -> float | None:
    """Return the value if it is a finite number."""
    converted = number(value)
    return None if converted is None or math.isnan(converted) else converted


def numbers(value: object) -> dict[str, float]:
    """Return the entries of an object that are numbers."""
    pairs = ((key, number(entry)) for key, entry in mapping(value).items())
    return {key: converted for key, converted in pairs if converted is not None}


def numbers_by_name(value: object) -> dict[str, dict[str, float]]:
    """Return the objects inside an object, each with its numbers."""
    return {name: numbers(entry) for name, entry in mapping(value).items()}
