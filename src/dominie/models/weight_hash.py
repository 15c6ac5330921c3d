"""What weights a model has, told by a hash: the same in a copied folder, another after training."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from dominie.models.folders import base_and_adapter
from dominie.models.spec import Model

_PIECE = 2**20
_PIECES = 64


def weights_fingerprint(spec: Model) -> str:
    """Hash of a frozen model: its configuration, its weights, and how they are held.

    A file of up to 64 MiB is hashed whole; of a larger one its size and 64 pieces of 1 MiB, evenly
    spread, the first (which names and places all tensors) and the last among them. A model on the
    hub is known by its name and commit.
    """
    base, adapter = base_and_adapter(spec)
    identity: dict[str, Any] = {
        "dtype": spec.dtype,
        "quantize": spec.bits,
        "map_tokens": spec.map_tokens,
    }
    for part, path in (("base", base), ("adapter", adapter)):
        if path is not None:
            identity[part] = _contents(path, spec.revision)
    text = json.dumps(identity, sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def commit(path: str, revision: str | None) -> str | None:
    """The commit of a hub model that has been fetched; the revision as given where it has not."""
    from huggingface_hub import try_to_load_from_cache

    if Path(path).is_dir():
        return None
    file = try_to_load_from_cache(path, "config.json", revision=revision)
    return Path(file).parent.name if isinstance(file, str) else revision


def _contents(path: str, revision: str | None) -> Any:
    if not Path(path).is_dir():
        return [path, commit(path, revision)]
    files = sorted(Path(path).glob("*.safetensors*"))
    configs = [Path(path) / name for name in ("config.json", "adapter_config.json")]
    return [
        [file.name, file.stat().st_size, _hash(file)]
        for file in (*configs, *files)
        if file.exists()
    ]


def _hash(file: Path) -> str:
    size, checksum = file.stat().st_size, hashlib.blake2b(digest_size=16)
    with file.open("rb") as stream:
        if size <= _PIECE * _PIECES:
            checksum.update(stream.read())
        else:
            for piece in range(_PIECES):
                stream.seek((size - _PIECE) * piece // (_PIECES - 1))
                checksum.update(stream.read(_PIECE))
    return checksum.hexdigest()
