"""Reading JSON that may be missing, cut in two by a crash, or not of the shape it should be."""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


def read_object(path: Path, notes: list[str]) -> dict[str, Any]:
    """The JSON object in a file; empty, with a note, where there is none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8", errors="replace"))
    except (OSError, ValueError, RecursionError):
        content = None
    if not isinstance(content, dict):
        notes.append(f"{place(path)} could not be read; it is left out.")
        return {}
    return content


def read_lines(
    path: Path, notes: list[str], maximum: int | None = None
) -> Iterator[dict[str, Any]]:
    """The objects of a file of JSON lines, without those that a crash cut in two.

    A file that is not there has no lines: that is for the caller to remark on.
    """
    try:
        lines = path.open(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return
    except (OSError, ValueError):  # a name the file system refuses, or a file not ours to read
        notes.append(f"{place(path)} could not be opened; it is left out.")
        return
    unreadable = 0
    with lines:
        for number, line in enumerate(lines):
            if maximum is not None and number >= maximum:
                notes.append(f"Of {place(path)} only the first {maximum:,} rows were read.")
                break
            try:
                content = json.loads(line) if line.strip() else None
            except (ValueError, RecursionError):
                unreadable += 1
                continue
            if isinstance(content, dict):
                yield content
    if unreadable:
        notes.append(
            f"{unreadable:,} line{'s' if unreadable > 1 else ''} of {place(path)} could not be "
            "read, cut off by a crash perhaps."
        )


def place(path: Path) -> str:
    """A file as people name it inside a run folder."""
    parts = path.parts
    if "evaluation" in parts:
        return "/".join(parts[parts.index("evaluation") :])
    return path.name if path.name == "results.json" else "/".join(parts[-2:])


def mapping(value: object) -> dict[str, Any]:
    """The value where it is an object, else an empty one."""
    return value if isinstance(value, dict) else {}


def sequence(value: object) -> list[Any]:
    """The value where it is a list, else an empty one."""
    return value if isinstance(value, list) else []


def text(value: object) -> str | None:
    """The value where it is a string."""
    return value if isinstance(value, str) else None


def number(value: object) -> float | None:
    """The value where it is a number (no boolean), with NaN for one that is not finite."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    try:
        converted = float(value)
    except OverflowError:
        return math.nan
    return converted if math.isfinite(converted) else math.nan


def finite(value: object) -> float | None:
    """The value where it is a finite number."""
    converted = number(value)
    return None if converted is None or math.isnan(converted) else converted


def numbers(value: object) -> dict[str, float]:
    """The entries of an object that are numbers."""
    pairs = ((key, number(entry)) for key, entry in mapping(value).items())
    return {key: converted for key, converted in pairs if converted is not None}


def numbers_by_name(value: object) -> dict[str, dict[str, float]]:
    """The objects inside an object, each with its numbers."""
    return {name: numbers(entry) for name, entry in mapping(value).items()}
