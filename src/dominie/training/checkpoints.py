"""Checkpoints that are either whole or not there: sealed, verified, rotated."""

from __future__ import annotations

import contextlib
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dominie.core.errors import DominieError, RunError
from dominie.core.io import file_manifest, fsync, manifest_error

_MANIFEST = "manifest.json"
_NAME = re.compile(r"checkpoint-(\d+)")
#: The optimiser's state as dominie wrote it before it kept transformers' own files.
_EARLIER = "optimizer.safetensors"


def publish(scratch: Path, folder: Path) -> None:
    """Give a folder that has been written its name, once everything in it is on disk.

    A reader sees the old folder, the new one or none; never half of one.
    """
    for path in sorted(scratch.rglob("*")):
        if path.is_file():
            fsync(path)
    shutil.rmtree(folder, ignore_errors=True)
    scratch.rename(folder)
    fsync(folder.parent)


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
    text = json.dumps({"files": file_manifest(folder)}, indent=1)
    (folder / _MANIFEST).write_text(text, encoding="utf-8")


def fault(folder: Path, *, hashes: bool = True) -> str | None:
    """What is wrong with a checkpoint: a file missing, of another size or other content.

    Args:
        folder: of the checkpoint.
        hashes: whether contents are read, too.

    Returns:
        A phrase that names the file, None for a checkpoint that is as it was written.
    """
    try:
        text = (folder / _MANIFEST).read_text(encoding="utf-8")
        files: dict[str, Any] = json.loads(text)["files"]
        if _EARLIER in files:
            return "an earlier version of dominie wrote it, whose optimiser state is not read"
        return manifest_error(folder, files, hashes=hashes)
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{_MANIFEST} cannot be read ({type(error).__name__})"


def newest_checkpoint(folder: Path) -> tuple[Path | None, dict[Path, str]]:
    """The latest checkpoint that is as it was written, and why later ones were passed over."""
    skipped: dict[Path, str] = {}
    for path in reversed(by_step(folder)):
        found = fault(path)
        if found is None:
            return path, skipped
        skipped[path] = found
    return None, skipped


def drop_old(folder: Path, *, keep: int, spare: Path | None) -> None:
    """Delete all but the newest `keep` whole checkpoints, never `spare` (the best one).

    One that is broken does not count, so that the last whole one always stays.
    """
    newest_first = list(reversed(by_step(folder)))
    whole = [path for path in newest_first if fault(path, hashes=False) is None]
    for path in newest_first:
        if path not in whole[:keep] and path != spare and len(whole) >= keep:
            shutil.rmtree(path, ignore_errors=True)


def by_step(folder: Path) -> list[Path]:
    """The checkpoints in a folder, whole or not, the newest last."""
    if not folder.is_dir():
        return []
    found = [
        (int(match[1]), path) for path in folder.iterdir() if (match := _NAME.fullmatch(path.name))
    ]
    return [path for _, path in sorted(found)]
