"""Reads YAML text without trust: bounded in size, depth, repetition and the size of numbers."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.constructor import DuplicateKeyError
from ruamel.yaml.error import MarkedYAMLError, YAMLError

from dominie.core.errors import InputError, nearest

#: Bytes of the largest recipe: its parser reads some hundred thousand a second.
_BYTES = 2**18
#: Values of the largest recipe, those that an alias repeats counted each time.
_VALUES = 50_000
_DEPTH = 50
#: No setting is larger, or smaller and not 0; beyond, sums and products are not finite.
_LARGEST, _SMALLEST = 1e15, 1e-30


def read_text(path: Path) -> str:
    """Read the file of a recipe.

    Raises:
        InputError: there is none, or it cannot be read.
    """
    try:
        with path.open("rb") as file:  # a pipe, too, or a device without an end
            content = file.read(_BYTES + 1)
        text = content.decode("utf-8-sig")
    except FileNotFoundError:
        near = _recipe_near(path)
        raise InputError(
            "no such recipe",
            where=str(path),
            do=f"did you mean {near}?" if near else "`dominie init DIR` writes one to begin with",
        ) from None
    except (OSError, ValueError) as error:
        raise InputError(
            "the recipe cannot be read",
            where=str(path),
            expected="a YAML file in UTF-8",
            found=getattr(error, "strerror", None) or str(error),
        ) from None
    if len(content) > _BYTES:
        raise InputError(
            "the recipe is too large",
            where=str(path),
            expected=f"at most {_BYTES // 1024} KiB of YAML",
            do="give the YAML file that describes the run, not data",
        )
    return text


def _recipe_near(path: Path) -> Path | None:
    """Find a recipe whose name is like that of one that does not exist."""
    places = {path.parent, Path()}
    files = [
        file for place in places for file in (*place.glob("*.y*ml"), *place.glob("*/recipe.yaml"))
    ]
    named = {file.parent.name if file.stem == "recipe" else file.stem: file for file in files}
    wanted = path.parent.name if path.stem == "recipe" else path.stem
    near = nearest(wanted, named)
    return named[near] if near else None


def parsed_yaml(text: str, *, where: str) -> Any:
    """Parse YAML 1.2, in which `2e-5` is a number and `no` is a text; refuse a repeated key.

    Raises:
        InputError: names the line, or the value that no recipe has.
    """
    try:
        yaml = YAML(typ="safe", pure=True)
        yaml.max_depth = _DEPTH  # before deeper levels are looked through
        tree = yaml.load(text)
        check_tree(tree, where=where)
        json.dumps(tree, default=str)  # fails for a key that is no text
        return without_aliases(tree)
    except DuplicateKeyError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else "?"
        raise InputError(
            "a key stands twice",
            where=f"{where}:{line}",
            found=str(error.problem).splitlines()[0],
            do="rename or remove one of the two",
        ) from None
    except MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else "?"
        raise InputError(
            "not valid YAML", where=f"{where}:{line}", found=str(error.problem)
        ) from None
    except (YAMLError, ValueError, TypeError, RecursionError, OverflowError) as error:
        raise InputError("not valid YAML", where=where, found=str(error).splitlines()[0]) from None


def without_aliases(value: Any) -> Any:
    """Copy what an alias repeats, so that an override changes one place."""
    if isinstance(value, dict):
        return {key: without_aliases(item) for key, item in value.items()}
    return [without_aliases(item) for item in value] if isinstance(value, list) else value


def check_tree(tree: Any, *, where: str) -> None:
    """Refuse what is too large, too deep or repeats itself, and values that no setting has.

    Raises:
        InputError: names the value.
    """
    values = _count(tree, {}, [], where)
    if values > _VALUES:
        raise InputError(
            "the recipe is too large",
            where=where,
            expected=f"at most {_VALUES:,} values, those that aliases repeat counted each time",
            found=f"{values:,}" if values < 10**9 else "more than a thousand million",
        )


def _count(value: Any, known: dict[int, int], path: list[str], where: str) -> int:
    """Count a value and those in it; what an alias repeats is looked at once."""
    if not isinstance(value, dict | list):
        _check_value(value, path, where)
        return 1
    if id(value) in known:
        if not known[id(value)]:
            raise InputError(
                "the recipe contains itself",
                where=_at(where, path),
                do="write out what the alias repeats",
            )
        return known[id(value)]
    if len(path) > _DEPTH:
        raise InputError(
            "the recipe is nested too deeply", where=where, expected=f"at most {_DEPTH} levels"
        )
    known[id(value)] = 0
    parts = value.items() if isinstance(value, dict) else enumerate(value)
    total = 1
    for key, part in parts:
        _check_value(key, path, where)
        total += _count(part, known, [*path, str(key)], where)
    known[id(value)] = total
    return total


def _check_value(value: Any, path: list[str], where: str) -> None:
    if isinstance(value, str) and "\0" in value:
        raise InputError(
            "a text holds a NUL character", where=_at(where, path), do="remove it: no name has one"
        )
    if isinstance(value, int | float) and not isinstance(value, bool):
        size = abs(value)
        if math.isfinite(value) and (size > _LARGEST or 0 < size < _SMALLEST):
            raise InputError(
                "the number is out of all proportion",
                where=_at(where, path),
                expected=f"0, or {_SMALLEST:g} to {_LARGEST:g} with either sign",
                found=f"{value:g}" if size < 10**300 else "more than 1e300",
            )


def _at(where: str, path: list[str]) -> str:
    return f"{where}: {'.'.join(path)}" if path else where
