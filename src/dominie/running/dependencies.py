"""What a stage depends on, key by key, so that what has changed can be told by name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

#: What stands behind a hash, for people.
_HASHED = {
    "rows": "other conversations, or another order of them",
    "tokenizer": "another tokenizer or chat template",
    "student": "another model, or other weights",
    "teacher": "another model, or other weights",
}
_SHOWN = 6  # changes that are told; of a changed teacher or tokenizer follow many


def training_dependencies(
    train: Mapping[str, Any], student: str, sources: Mapping[str, Any], tokenizer: str
) -> dict[str, Any]:
    """Of a stage that trains: the parts of its fingerprint, and what its rows are made by."""
    settings = dict(train)
    settings |= settings.pop("arguments", {})
    tree = {"train": settings, "student": student, "tokenizer": tokenizer, "data": sources}
    return _flat(tree)


def making_dependencies(
    settings: Mapping[str, Any], models: Sequence[str], rows: str | None = None
) -> dict[str, Any]:
    """Of a stage that makes a model of others."""
    read = {f"model {number}": model for number, model in enumerate(models, start=1)}
    return _flat({**settings, **read, "rows": rows})


def changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What differs between the dependencies of two times, a phrase each; most telling first."""
    apart = [key for key in sorted(before.keys() | now.keys()) if before.get(key) != now.get(key)]
    if "tokenizer" in apart or "train.max_length" in apart:  # rows differ for their sake
        apart = [key for key in apart if not key.endswith(".rows")]
    told = [_told(key, before.get(key), now.get(key)) for key in apart]
    more = len(told) - _SHOWN
    return [*told[:_SHOWN], *([f"{more} more"] if more > 0 else [])]


def moved(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What runs a stage now that did not when it began, as far as that is known."""
    was, current = _flat(before), _flat(now)
    return [
        f"{key.removeprefix('versions.')} {current[key]} (begun with {was[key]})"
        for key in current
        if key in was and was[key] != current[key]
    ]


def _told(key: str, before: Any, now: Any) -> str:
    last = key.rpartition(".")[2]
    if last in _HASHED and before is not None and now is not None:
        return f"{key}: {_HASHED[last]}"
    if last.startswith("model ") and before is not None and now is not None:
        return f"{key}: {_HASHED['student']}"
    return f"{key}: {_shown(before)} before, {_shown(now)} now"


def _shown(value: Any) -> str:
    return "nothing" if value is None else str(value)


def _flat(value: Any, path: str = "") -> dict[str, Any]:
    """Leaves by dotted path; those that are None left out."""
    if isinstance(value, Mapping):
        flat: dict[str, Any] = {}
        for key, item in value.items():
            flat |= _flat(item, f"{path}.{key}" if path else str(key))
        return flat
    if value is None:
        return {}
    return {path: value if isinstance(value, str | int | float | bool) else str(value)}
