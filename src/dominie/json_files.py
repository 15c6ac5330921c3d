"""JSON files that are either whole or as they were before."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def write_json(path: Path, value: Mapping[str, Any], *, indent: int | None = 1) -> None:
    """Replace a file in one step: no interruption leaves half of it."""
    scratch = path.with_name(f".{path.name}")
    scratch.write_text(json.dumps(value, indent=indent), encoding="utf-8")
    scratch.replace(path)
