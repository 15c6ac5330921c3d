"""JSON files that are either whole or as they were before, and tell when a bit is another."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dominie.files.disk import replace_text

_CHECKSUM = "checksum"


def write_json(path: Path, value: Mapping[str, Any], *, indent: int | None = 1) -> None:
    """Replace a file in one step: no interruption leaves half of it."""
    replace_text(path, json.dumps(value, indent=indent))


def write_sealed(path: Path, value: Mapping[str, Any], *, indent: int | None = 1) -> None:
    """`write_json` with a checksum of the rest as the last key."""
    write_json(path, {**value, _CHECKSUM: _checksum(value)}, indent=indent)


def read_sealed(path: Path) -> dict[str, Any]:
    """What `write_sealed` wrote, without the checksum. A file from before there was one is taken.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is no JSON object, or not as it was written.
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
    text = json.dumps(rest, sort_keys=True)  # as they are when they have been read
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
