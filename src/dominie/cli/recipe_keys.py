"""The keys that a recipe can be given on the command line, as the shell offers them.

What keys there are is known without importing what they are made of: `docs/recipe_keys.py` writes
them beside this file, each with the values it may have or its default.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from importlib import resources
from typing import Any

#: What may stand on a command line without quotes.
_PLAIN = re.compile(r"[\w.+/-]+")


def offered_keys(tree: Mapping[str, Any], incomplete: str) -> Iterator[str]:
    """What may follow: parts of keys up to the next dot, whole keys, and values of a whole one.

    Args:
        tree: the recipe as its file has it, whose names stand in for those of the schema.
        incomplete: what has been typed.
    """
    values = _values(tree)
    key, equals, _ = incomplete.partition("=")
    if equals:
        yield from (f"{key}={value}" for value in values.get(key, ()))
        return
    begun = incomplete
    while True:
        at = len(begun)
        found = [key for key in values if key.startswith(begun)]
        steps = {re.match(r"[^.]*\.?", key[at:])[0] for key in found}  # type: ignore[index]
        if len(steps) != 1 or not (step := steps.pop()).endswith("."):
            break
        begun += step  # a single part is no choice: what comes after it is
    ends = {key[: at + len(step)] for key in found for step in [_step(key[at:])]}
    yield from (end if end.endswith(".") else f"{end}=" for end in ends)
    if len(ends) == 1:  # with a second word to choose, the shell puts no space after the `=`
        yield from (f"{key}={value}" for key in found for value in values[key])


def _step(text: str) -> str:
    """A part of a key with the dot that ends it, where one does."""
    head, dot, _ = text.partition(".")
    return head + dot


def _values(tree: Mapping[str, Any]) -> dict[str, list[str]]:
    """The recipe's keys, each with the values to offer for it."""
    table = json.loads(
        resources.files("dominie.cli").joinpath("recipe_keys.json").read_text("utf-8")
    )
    found: dict[str, list[str]] = {}
    for pattern, known in table.items():
        for parts in _named(pattern.split("."), tree):
            if _is_of_another_kind(parts, tree):
                continue
            present = _text(_present(tree, parts))
            found[".".join(parts)] = list(dict.fromkeys([*([present] if present else ()), *known]))
    return found


def _named(pattern: Sequence[str], tree: Any) -> Iterator[list[str]]:
    """A pattern's paths, with the recipe's own names in place of `*`."""
    if not pattern:
        yield []
        return
    inner = tree if isinstance(tree, Mapping) else {}
    for name in map(str, inner) if pattern[0] == "*" else [pattern[0]]:
        for rest in _named(pattern[1:], inner.get(name)):
            yield [name, *rest]


def _is_of_another_kind(parts: Sequence[str], tree: Mapping[str, Any]) -> bool:
    """Whether a stage's key belongs to a kind of stage that this one is not."""
    if parts[0] != "stages" or len(parts) < 3:
        return False
    stage = tree["stages"][parts[1]]
    own = {"merge", "upcycle"} & set(stage) if isinstance(stage, Mapping) else set()
    if own:
        return parts[2] not in {*own, "train"}
    return parts[2] in ("merge", "upcycle")


def _present(tree: Any, parts: Sequence[str]) -> Any:
    """The value that a recipe gives a key; a stage has the recipe's `train`."""
    node = tree
    for part in parts:
        node = node.get(part) if isinstance(node, Mapping) else None
    if node is None and parts[0] == "stages" and len(parts) > 3 and parts[2] == "train":
        return _present(tree, parts[2:])
    return node


def _text(value: Any) -> str | None:
    """A value as it is typed; None of one that needs quotes."""
    said = str(value).lower() if isinstance(value, bool) else str(value)
    plain = isinstance(value, bool | int | float | str) and _PLAIN.fullmatch(said)
    return said if plain else None
