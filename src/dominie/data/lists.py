"""Lists in columns: as they are, or written in a text."""

from __future__ import annotations

import ast
import json
from typing import Any


def listed(value: Any) -> list[Any] | None:
    """What is a list, or is written as one in JSON or Python; None for anything else."""
    if isinstance(value, (list, tuple)):
        return list(value)
    if not isinstance(value, str) or not value.strip().startswith("["):
        return None
    for read in (json.loads, ast.literal_eval):
        try:
            found = read(value.strip())
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            continue
        return found if isinstance(found, list) else None
    return None
