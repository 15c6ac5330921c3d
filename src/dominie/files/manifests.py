"""What files were when they were written, and whether they still are: sizes and SHA-256."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import Any


def described(folder: Path, files: Iterable[Path] | None = None) -> dict[str, dict[str, Any]]:
    """Size and SHA-256 of files by their path in a folder; of all in it unless some are named."""
    paths = sorted(folder.rglob("*") if files is None else files)
    found = [path for path in paths if path.is_file()]
    with ThreadPoolExecutor() as pool:  # hashing leaves the interpreter to others
        hashes = list(pool.map(sha256_of, found))
    return {
        path.relative_to(folder).as_posix(): {"size": path.stat().st_size, "sha256": sha256}
        for path, sha256 in zip(found, hashes, strict=True)
    }


def fault_in(folder: Path, files: Mapping[str, Any], *, hashes: bool = True) -> str | None:
    """What is wrong with a folder: a file missing, of another size or other content.

    Args:
        folder: that was described.
        files: as `described` gives them.
        hashes: whether contents are read, too.

    Returns:
        A phrase that names the file; None where all are as they were written.

    Raises:
        ValueError, KeyError, TypeError, AttributeError: `files` is no description.
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
        found = pool.map(lambda name: sha256_of(folder / name), files)
        for (name, each), sha256 in zip(files.items(), found, strict=True):
            if sha256 != each["sha256"]:
                return f"{name} is not as it was written"
    return None


def is_inside(name: str) -> bool:
    """Whether a name that a file gives stays within the folder it is looked up in."""
    path = PurePosixPath(name)
    return bool(path.parts) and not path.is_absolute() and ".." not in path.parts


def sha256_of(path: Path) -> str:
    """Of a file's content, in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
