"""Error messages about the keys and values of a recipe."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Iterable, Sequence
from typing import Any

import pydantic

from dominie.core.errors import InputError, nearest
from dominie.generation.endpoint import ServedModel
from dominie.models.spec import Model
from dominie.recipe.schema import Recipe
from dominie.recipe.stage_config import StageConfig, stage_kinds

#: What was expected, in the terms of a recipe, by pydantic's name of the error.
_EXPECTED = {
    "string_type": "text",
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "bool_type": "true or false",
    "list_type": "a list",
    "dict_type": "a mapping",
    "dataclass_type": "a mapping",
    "dataclass_exact_type": "a mapping",
}


def unknown_key(where: str, key: object, known: Iterable[str]) -> InputError:
    """Report a key that does not exist here, and the nearest one that does."""
    known = sorted(known)
    near = nearest(key, known)
    hint = f"did you mean {near}?" if near else None
    expected = None if near and len(known) > 20 else f"one of {', '.join(known)}"
    return InputError("unknown key", where=where, expected=expected, do=hint)


def _key_in_train(path: Sequence[str]) -> str | None:
    """Find the place of a key that is beside `train` and belongs in it."""
    *above, key = path
    beside_train = not above or (above[0] == "stages" and len(above) == 2)
    if beside_train and key in known_keys(["train"]):
        return ".".join([*above, "train", key])
    return None


def first_problem(
    error: pydantic.ValidationError, tree: dict[str, Any], written: dict[str, Any], *, where: str
) -> InputError:
    """Report the first problem; unknown keys come before the keys they leave missing.

    Args:
        tree: the recipe that pydantic looked at.
        written: the recipe as its file has it, before overrides.
    """
    problems = sorted(error.errors(), key=lambda e: e["type"] != "unexpected_keyword_argument")
    problem = problems[0]
    path = [str(part) for part in problem["loc"]]
    keys = _keys(path)
    dotted = ".".join(keys)
    if problem["type"] == "unexpected_keyword_argument":
        inner = _key_in_train(keys)
        if inner is not None:
            return InputError(
                "unknown key", where=f"{where}: {dotted}", do=f"did you mean {inner}?"
            )
        not_here: dict[str, str] = getattr(_settings_at(path[:-1]), "not_here", {})
        if path[-1] in not_here:
            return InputError(not_here[path[-1]], where=f"{where}: {dotted}", do="remove the key")
        return unknown_key(f"{where}: {dotted}", path[-1], known_keys(path[:-1]))
    if problem["type"] in ("missing", "missing_argument"):
        return _mistaken_name(keys, written, where=where) or InputError(
            "missing key", where=f"{where}: {dotted}"
        )
    if problem["type"] == "union_tag_invalid":
        kinds = str(problem["ctx"]["expected_tags"])
        return InputError(
            f"unknown kind {problem['ctx']['tag'].strip('<>')!r}",
            where=f"{where}: {dotted}.kind",
            expected=f"one of {kinds.translate(str.maketrans('', '', chr(39) + '<>'))}",
        )
    if problem["type"] == "value_error":
        return InputError(str(problem["ctx"]["error"]), where=f"{where}: {dotted}")
    place, value = _place(tree, path)
    alike = [p for p in problems if _place(tree, [str(part) for part in p["loc"]])[0] == place]
    return wrong_type(alike, value, where=f"{where}: {'.'.join(place)}")


def _mistaken_name(path: Sequence[str], written: Any, *, where: str) -> InputError | None:
    """Report an override of something that the recipe does not have, if that is the cause."""
    for depth, part in enumerate(path):
        if not isinstance(written, dict):
            return None
        if part not in written:
            near = nearest(part, written)
            if not near or depth in (0, len(path) - 1):
                return None
            meant = ".".join([*path[:depth], near])
            return InputError(
                "an override names what the recipe has not",
                where=f"{where}: {'.'.join(path[: depth + 1])}",
                expected=f"one of {', '.join(map(str, written))}",
                do=f"did you mean {meant}?",
            )
        written = written[part]
    return None


def wrong_type(problems: Sequence[Any], value: Any, *, where: str) -> InputError:
    """Report a value that is of none of the accepted types, one problem for each type."""
    expected = [
        _EXPECTED.get(p["type"], p["msg"].removeprefix("Input should be ")) for p in problems
    ]
    return InputError(
        "the value cannot be used",
        where=where,
        expected=" or ".join(dict.fromkeys(expected)),
        found=describe_value(value),
    )


def _place(tree: Any, path: Sequence[str]) -> tuple[list[str], Any]:
    """Find the part of `path` that exists in the recipe, and its value."""
    place: list[str] = []
    for part in _keys(path):
        named = {str(key): value for key, value in tree.items()} if isinstance(tree, dict) else {}
        if part not in named:
            break
        tree = named[part]
        place.append(part)
    return place, tree


def _is_tag(path: Sequence[str], index: int) -> bool:
    """Whether a part of pydantic's path is the tag of a kind of object, and no key.

    A key may look like one: it is known by its place.
    """
    above = list(path[:index])
    return (above[:1] in (["stages"], ["models"]) and index == 2) or (
        (above[:2] == ["evaluate", "benchmarks"] and index == 3)
        or (above[:1] == ["stages"] and above[-1] == "teacher" and index in (4, 6))
    )


def _keys(path: Sequence[str]) -> list[str]:
    """Drop the parts of pydantic's path that are no keys of the recipe."""
    return [part for index, part in enumerate(path) if not _is_tag(path, index)]


def known_keys(path: Sequence[str]) -> list[str]:
    """List the fields of the object at `path` in a recipe."""
    kind = _settings_at(path)
    return [
        f.name
        for f in dataclasses.fields(kind)
        if f.name not in ("name", "arguments") or kind is Recipe
    ]


def _settings_at(path: Sequence[str]) -> Any:
    """The class of the object at `path` in a recipe."""
    kind: Any = Recipe
    options: list[Any] = []
    for index, part in enumerate(path):
        if _is_tag(path, index):
            if path[0] == "models":
                kind = ServedModel if part == "<served>" else Model
                continue
            kinds = [*stage_kinds().values(), *options]
            kind = next(option for option in kinds if f"<{option.kind}>" == part)
            continue
        if dataclasses.is_dataclass(kind):
            kind = typing.get_type_hints(kind)[part]
        else:  # dict[str, X]
            kind = typing.get_args(kind)[1]
        options = [option for option in typing.get_args(kind) if dataclasses.is_dataclass(option)]
        if kind is StageConfig:
            kind = stage_kinds()["train"]
        if not dataclasses.is_dataclass(kind) and typing.get_origin(kind) is not dict and options:
            kind = options[0]
    return kind


def describe_value(value: Any) -> str:
    """Describe a value for a message."""
    names = {dict: "a mapping", list: "a list", str: f"the text {value!r}", type(None): "nothing"}
    return names.get(type(value), repr(value))
