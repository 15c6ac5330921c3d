"""Checkpoints that are either whole or not there, and hold no pickle."""

from __future__ import annotations

import contextlib
import json
import random
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from dominie.core.errors import DominieError, RunError
from dominie.core.io import file_manifest, fsync, manifest_error

_MANIFEST = "manifest.json"
_NAME = re.compile(r"checkpoint-(\d+)")


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


def random_states() -> dict[str, Any]:
    """Python's, numpy's, torch's and every GPU's, as tensors and plain values."""
    kind, keys, *rest = np.random.get_state()
    return {
        "python": random.getstate(),
        "numpy": [kind, torch.from_numpy(np.asarray(keys, dtype=np.int64)), *map(_plain, rest)],
        "torch": torch.random.get_rng_state(),
        "cuda": torch.cuda.random.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def restore_random_states(states: dict[str, Any]) -> None:
    """Put the generators back where `random_states` found them.

    On another number of GPUs than before, theirs are left as they are.
    """
    random.setstate(states["python"])
    kind, keys, *rest = states["numpy"]
    np.random.set_state((kind, keys.cpu().numpy().astype(np.uint32), *rest))
    torch.random.set_rng_state(states["torch"].cpu())
    if len(states["cuda"]) == torch.cuda.device_count() > 0:
        torch.cuda.random.set_rng_state_all([state.cpu() for state in states["cuda"]])


def _plain(value: Any) -> int | float:
    number: int | float = value.item() if isinstance(value, np.generic) else value
    return number


_PLAIN = (str, int, float, bool, type(None))


def write_state(stem: Path, state: Any) -> None:
    """Write `stem.safetensors` and `stem.json`.

    Args:
        stem: path of both files without their suffix.
        state: tensors, numbers, texts and None in dicts (keyed by text or number), lists, tuples.

    Raises:
        TypeError: something else is in it.
    """
    tensors: dict[str, torch.Tensor] = {}
    structure = _encoded(state, tensors)
    stem.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, stem.with_suffix(".safetensors"))
    stem.with_suffix(".json").write_text(json.dumps(structure), encoding="utf-8")


def read_state(stem: Path, *, device: str | torch.device = "cpu") -> Any:
    """What `write_state` wrote, bit for bit, its tensors on a device."""
    structure = json.loads(stem.with_suffix(".json").read_text(encoding="utf-8"))
    place = torch.device(device)  # of one process of several it is cpu:0, which is no place there
    where = "cpu" if place.type == "cpu" else str(place)
    tensors = load_file(stem.with_suffix(".safetensors"), device=where)
    return _decoded(structure, tensors)


def has_state(stem: Path) -> bool:
    """Whether both files are there."""
    return stem.with_suffix(".json").is_file() and stem.with_suffix(".safetensors").is_file()


def _encoded(value: Any, tensors: dict[str, torch.Tensor]) -> Any:
    if isinstance(value, torch.Tensor):
        name = str(len(tensors))
        tensors[name] = value.detach().cpu().clone(memory_format=torch.contiguous_format)
        return {"tensor": name}
    if isinstance(value, dict):
        if not all(isinstance(key, str | int) for key in value):
            raise TypeError(f"keys of a state are texts or numbers, found {list(value)[:3]}")
        return {"dict": [[key, _encoded(item, tensors)] for key, item in value.items()]}
    if isinstance(value, list | tuple):
        kind = "tuple" if isinstance(value, tuple) else "list"
        return {kind: [_encoded(item, tensors) for item in value]}
    if isinstance(value, _PLAIN):
        return value
    raise TypeError(f"a state holds no {type(value).__name__}")


def _decoded(value: Any, tensors: dict[str, torch.Tensor]) -> Any:
    if not isinstance(value, dict):
        return value
    (kind, content), *_ = value.items()
    if kind == "tensor":
        return tensors[content]
    if kind == "dict":
        return {key: _decoded(item, tensors) for key, item in content}
    items = [_decoded(item, tensors) for item in content]
    return tuple(items) if kind == "tuple" else items
