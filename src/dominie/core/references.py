"""Marks the fields of settings that name a model, a source or a path; lists and replaces them."""

from __future__ import annotations

import dataclasses
import functools
import types
import typing
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeVar

T = TypeVar("T")

#: `path` may be a folder or file here or an id of the hub; `data` the same of a source; `output` is
#: a folder that need not exist yet.
Kind = Literal["model", "source", "path", "data", "output"]


@dataclass(frozen=True)
class Reference:
    """The mark: `field: Annotated[str, Reference("path")]`."""

    kind: Kind


ModelName = Annotated[str, Reference("model")]
SourceName = Annotated[str, Reference("source")]
PathName = Annotated[str, Reference("path")]


def references(settings: Any, kind: Kind) -> dict[str, str]:
    """The names of one kind in an object of settings, by the dotted key that each stands at."""
    found: dict[str, str] = {}

    def note(of: Kind, text: str, where: str) -> str:
        if of == kind:
            found[where] = text
        return text

    _walk(settings, type(settings), note, "")
    return found


def rewritten(settings: T, of: Callable[[Kind, str], str]) -> T:
    """The dataclass with every marked text replaced, at any depth, by `of(kind, text)`."""
    made: T = _walk(settings, type(settings), lambda kind, text, _: of(kind, text), "")
    return made


def _walk(value: Any, hint: Any, of: Callable[[Kind, str, str], str], where: str) -> Any:
    hint, kind = _unwrapped(hint, value)
    if isinstance(value, str):
        return of(kind, value, where) if kind else value
    inside = f"{where}.".lstrip(".")
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        hints = _hints(type(value))
        old = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
        new = {name: _walk(part, hints[name], of, inside + name) for name, part in old.items()}
        changed = {name: part for name, part in new.items() if part is not old[name]}
        return dataclasses.replace(value, **changed) if changed else value
    if isinstance(value, dict):
        names, parts = typing.get_args(hint) or (Any, Any)
        mapped = {
            _walk(name, names, of, f"{inside}{name}"): _walk(part, parts, of, f"{inside}{name}")
            for name, part in value.items()
        }
        return value if mapped == value else mapped
    if isinstance(value, list):
        (parts,) = typing.get_args(hint) or (Any,)
        listed = [_walk(part, parts, of, f"{inside}{n}") for n, part in enumerate(value)]
        return value if listed == value else listed
    return value


@functools.cache
def _hints(kind: type) -> dict[str, Any]:
    return typing.get_type_hints(kind, include_extras=True)


def _unwrapped(hint: Any, value: Any) -> tuple[Any, Kind | None]:
    """A type without its marks, of a union the member that fits the value; and the kind marked."""
    if typing.get_origin(hint) is Annotated:
        inner, *marks = typing.get_args(hint)
        marked = next((mark.kind for mark in marks if isinstance(mark, Reference)), None)
        bare, kind = _unwrapped(inner, value)
        return bare, marked or kind
    if typing.get_origin(hint) not in (typing.Union, types.UnionType):
        return hint, None
    members = [_unwrapped(m, value) for m in typing.get_args(hint) if m is not type(None)]
    wanted = next((m for m in members if (typing.get_origin(m[0]) or m[0]) is type(value)), None)
    return wanted or members[0]
