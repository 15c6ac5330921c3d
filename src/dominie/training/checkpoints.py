"""Checkpoints that are either whole or not there."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from dominie.errors import DominieError, RunError

_MANIFEST = "manifest.json"
_NAME = re.compile(r"checkpoint-(\d+)")


def publish(scratch: Path, folder: Path) -> None:
    """Give a folder that has been written its name, once everything in it is on disk.

    A reader sees the old folder, the new one or none; never half of one.
    """
    for path in sorted(scratch.rglob("*")):
        if path.is_file():
            _sync(path)
    shutil.rmtree(folder, ignore_errors=True)
    scratch.rename(folder)
    _sync(folder.parent)


@contextlib.contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Within, `folder` is written; where that fails, nothing of it stays to fill the disk.

    Raises:
        RunError: in the place of whatever the libraries that write raise.
    """
    try:
        yield
    except DominieError:
        raise
    except Exception as error:
        shutil.rmtree(folder, ignore_errors=True)
        raise RunError(
            "the files cannot be written",
            where=str(folder),
            found=" ".join(str(error).split())[:200],
            do="make room; the same command goes on from the last checkpoint",
        ) from error


def seal(folder: Path) -> None:
    """Write down what the checkpoint consists of, so that a reader can tell whether it is whole."""
    sizes = {
        str(p.relative_to(folder)): p.stat().st_size
        for p in sorted(folder.rglob("*"))
        if p.is_file()
    }
    (folder / _MANIFEST).write_text(json.dumps({"sizes": sizes}, indent=1))


def is_whole(folder: Path) -> bool:
    """Whether every file of the manifest is there in its full size."""
    try:
        sizes = json.loads((folder / _MANIFEST).read_text())["sizes"]
        return all((folder / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError, KeyError):
        return False


def newest_checkpoint(folder: Path) -> Path | None:
    """The whole checkpoint of the latest step; broken ones are passed over."""
    return next((path for path in reversed(_by_step(folder)) if is_whole(path)), None)


def drop_old(folder: Path, *, keep: int, spare: Path | None) -> None:
    """Delete all but the newest `keep` checkpoints, never `spare` (the best one)."""
    for path in _by_step(folder)[:-keep]:
        if spare is None or path != spare:
            shutil.rmtree(path, ignore_errors=True)


def _by_step(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    found = [
        (int(match[1]), path) for path in folder.iterdir() if (match := _NAME.fullmatch(path.name))
    ]
    return [path for _, path in sorted(found)]


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
