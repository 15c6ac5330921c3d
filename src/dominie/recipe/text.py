"""The text of a recipe: its file read, its YAML parsed, each fault by its line."""

from __future__ import annotations

import difflib
import json
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.constructor import DuplicateKeyError
from ruamel.yaml.error import MarkedYAMLError, YAMLError

from dominie.errors import InputError


def read_text(path: Path) -> str:
    """What a recipe's file holds.

    Raises:
        InputError: there is none, or it cannot be read.
    """
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        near = _recipe_near(path)
        raise InputError(
            "no such recipe",
            where=str(path),
            do=f"did you mean {near}?" if near else "`dominie init DIR` writes one to begin with",
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            "the recipe cannot be read",
            where=str(path),
            expected="a YAML file in UTF-8",
            found=getattr(error, "strerror", None) or str(error),
        ) from None


def _recipe_near(path: Path) -> Path | None:
    """A recipe whose name is like that of one that is not there."""
    places = {path.parent, Path()}
    files = [
        file for place in places for file in (*place.glob("*.y*ml"), *place.glob("*/recipe.yaml"))
    ]
    named = {file.parent.name if file.stem == "recipe" else file.stem: file for file in files}
    wanted = path.parent.name if path.stem == "recipe" else path.stem
    near = difflib.get_close_matches(wanted, named, n=1, cutoff=0.6)
    return named[near[0]] if near else None


def parsed_yaml(text: str, *, where: str) -> Any:
    """YAML 1.2, where `2e-5` is a number and `no` is a word; a key given twice is refused.

    Raises:
        InputError: names the line.
    """
    try:
        tree = YAML(typ="safe", pure=True).load(text)
        json.dumps(tree, default=str)  # fails where an alias leads in a circle or a key is no word
        return unshared(tree)
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
    except (YAMLError, ValueError, TypeError, RecursionError) as error:
        raise InputError("not valid YAML", where=where, found=str(error).splitlines()[0]) from None


def unshared(value: Any) -> Any:
    """A copy in which what an alias repeats is repeated: an override then changes one place."""
    if isinstance(value, dict):
        return {key: unshared(item) for key, item in value.items()}
    return [unshared(item) for item in value] if isinstance(value, list) else value
