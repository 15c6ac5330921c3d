"""Reads values of JSON whose shape is not trusted: the value if it has the type, else nothing."""

from __future__ import annotations

import math
from typing import Any


def mapping(value: object) -> dict[str, Any]:
    """Return the value if it is an object, else an empty one."""
    return value if isinstance(value, dict) else {}


def sequence(value: object) -> list[Any]:
    """Return the value if it is a list, else an empty one."""
    return value if isinstance(value, list) else []


def text(value: object) -> str | None:
    """Return the value if it is a string."""
    return value if isinstance(value, str) else None


def number(value: object) -> float | None:
    """Return the value if it is a number (no boolean), with NaN for one that is not finite."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    try:
        converted = float(value)
    except OverflowError:
        return math.nan
    return converted if math.isfinite(converted) else math.nan


def finite(value: object) -> float | None:
    """Return the value if it is a finite number."""
    converted = number(value)
    return None if converted is None or math.isnan(converted) else converted


def numbers(value: object) -> dict[str, float]:
    """Return the entries of an object that are numbers."""
    pairs = ((key, number(entry)) for key, entry in mapping(value).items())
    return {key: converted for key, converted in pairs if converted is not None}


def numbers_by_name(value: object) -> dict[str, dict[str, float]]:
    """Return the objects inside an object, each with its numbers."""
    return {name: numbers(entry) for name, entry in mapping(value).items()}
