"""Optimiser, schedule and random states as tensors and JSON: reading them runs nothing.

`torch.save` writes pickles. Here a nested state becomes two files: its tensors in safetensors, and
its structure in JSON, where a tensor stands as the name it has in the other file.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

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
