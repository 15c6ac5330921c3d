"""Prints the keys of a recipe for the shell's completion; `--write` puts them where it looks."""

from __future__ import annotations

import dataclasses
import json
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from generated import say_or_write

from dominie.recipe import Recipe, StageConfig, stage_kinds

PAGE = Path(__file__).parents[1] / "src" / "dominie" / "cli" / "recipe_keys.json"

_HIDDEN = {("Source", "name"), ("TrainSettings", "arguments")}
#: Fields of transformers that are set on a command line, which takes them as they are.
_THEIRS = (
    "lr_scheduler_type",
    "max_grad_norm",
    "optim",
    "report_to",
    "warmup_ratio",
    "weight_decay",
)


def page() -> str:
    """A JSON object: each key, `*` for a name of the recipe's own, with values to offer for it."""
    found = dict(_keys(Recipe, ""))
    for place in ("train", "stages.*.train"):
        found |= {f"{place}.{name}": [] for name in _THEIRS}
    lines = (f"  {json.dumps(key)}: {json.dumps(values)}" for key, values in sorted(found.items()))
    return "{\n" + ",\n".join(lines) + "\n}\n"


def _keys(kind: Any, path: str) -> Iterator[tuple[str, list[str]]]:
    hints = typing.get_type_hints(kind)
    for field in dataclasses.fields(kind):
        if (kind.__name__, field.name) in _HIDDEN:
            continue
        here = f"{path}{field.name}"
        hint = hints[field.name]
        if values := _values(hint, field):
            yield here, values
        elif not _is_nested(hint):
            yield here, []
        for inner, names in _objects(hint):
            yield from _keys(inner, f"{here}.{names}")
        if typing.get_origin(hint) is dict and not list(_objects(hint)):
            yield f"{here}.*", []


def _objects(hint: Any) -> Iterator[tuple[Any, str]]:
    """The objects within a type, each with the names that stand before its keys."""
    origin = typing.get_origin(hint)
    if hint is StageConfig:
        for kind in stage_kinds().values():
            yield kind, ""
    elif dataclasses.is_dataclass(hint):
        yield hint, ""
    elif origin is dict:
        for inner, names in _objects(typing.get_args(hint)[1]):
            yield inner, f"*.{names}"
    elif origin in (typing.Union, types.UnionType, typing.Annotated):
        for member in typing.get_args(hint):
            yield from _objects(member)


def _is_nested(hint: Any) -> bool:
    return typing.get_origin(hint) is dict or any(True for _ in _objects(hint))


def _values(hint: Any, field: dataclasses.Field[Any]) -> list[str]:
    """The values that a key may have where they are few; else its default, where it has one."""
    if "values" in field.metadata:
        return list(field.metadata["values"])
    members = typing.get_args(hint) if _is_union(hint) else (hint,)
    if bool in members:
        return ["true", "false"]
    if named := [
        str(v) for m in members if typing.get_origin(m) is Literal for v in typing.get_args(m)
    ]:
        return named
    plain = isinstance(field.default, int | float | str)
    return [str(field.default)] if plain and str(field.default) else []


def _is_union(hint: Any) -> bool:
    return typing.get_origin(hint) in (typing.Union, types.UnionType)


if __name__ == "__main__":
    say_or_write(PAGE, page())
