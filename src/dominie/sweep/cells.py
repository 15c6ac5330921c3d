"""What a sweep consists of: runs of one recipe, each with its own values."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from dominie.errors import InputError
from dominie.recipe import Recipe, dump_recipe, load_recipe, only_models


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One run of a sweep.

    Attributes:
        name: of its run folder within the sweep's.
        recipe: the recipe's file.
        seed: `train.seed` of the run; None leaves the recipe's.
        values: what the sweep varies, by the recipe's key: a point of the grid.
        fixed: further overrides, the same for the whole sweep.
        only: the models that are scored; all where empty.
    """

    name: str
    recipe: Path
    seed: int | None = None
    values: Mapping[str, str] = field(default_factory=dict)
    fixed: tuple[str, ...] = ()
    only: tuple[str, ...] = ()

    @property
    def overrides(self) -> list[str]:
        """Everything that is set over the recipe."""
        seed = [] if self.seed is None else [f"train.seed={self.seed}"]
        varied = [f"{key}={value}" for key, value in self.values.items()]
        return [*self.fixed, *varied, *seed, f"name={self.name}"]

    def loaded(self) -> Recipe:
        """The recipe as the run will read it.

        Raises:
            InputError: a value of the cell cannot be used.
        """
        recipe = load_recipe(self.recipe, self.overrides)
        return only_models(recipe, self.only) if self.only else recipe

    def digest(self) -> str:
        """Changes exactly when the resolved recipe does."""
        return hashlib.blake2b(dump_recipe(self.loaded()).encode(), digest_size=8).hexdigest()


def grid(
    recipe: Path,
    over: Sequence[str],
    *,
    seeds: Sequence[int | None] = (None,),
    fixed: Sequence[str] = (),
    only: Sequence[str] = (),
    prefix: str = "",
) -> list[Cell]:
    """Every combination of the values, for every seed; seeds vary fastest.

    Runs that stand beside each other then share the fewest stages, so that none waits for another.

    Args:
        recipe: the recipe's file.
        over: `a.b.c=1,2,3` each.
        seeds: of the runs.
        fixed: overrides of all of them.
        only: the models that are scored.
        prefix: what the names of runs begin with.

    Raises:
        InputError: a list of values that is none.
    """
    axes: dict[str, list[str]] = {}
    for each in over:
        key, equals, text = each.partition("=")
        values = _values_of(text)
        if not equals or not all(key.split(".")) or not all(values):
            raise InputError("not a list of values", where=f"--over {each}", expected="a.b.c=1,2,3")
        if key in ("name", "train.seed"):
            do = "seeds are given by --seeds 0-4" if key == "train.seed" else "leave it out"
            raise InputError("a sweep gives these itself", where=f"--over {each}", do=do)
        if key in axes:
            raise InputError("a key is varied twice", where=f"--over {each}")
        axes[key] = list(dict.fromkeys(values))
    points = [dict(zip(axes, point, strict=True)) for point in itertools.product(*axes.values())]
    cells = [
        Cell(
            name=_name(prefix, values, seed),
            recipe=recipe,
            seed=seed,
            values=values,
            fixed=tuple(fixed),
            only=tuple(only),
        )
        for values in points
        for seed in seeds
    ]
    return _told_apart(cells)


def seeds_of(text: str) -> list[int]:
    """`0-4`, `3` or `0,2,5-7` as numbers.

    Raises:
        InputError: it is none of these.
    """
    seeds: list[int] = []
    for part in text.split(","):
        found = re.fullmatch(r"\s*(\d+)(?:-(\d+))?\s*", part)
        first, last = (int(found[1]), int(found[2] or found[1])) if found else (1, 0)
        if first > last:
            raise InputError("not a list of seeds", where=f"--seeds {text}", expected="0-4 or 0,2")
        seeds += range(first, last + 1)
    return list(dict.fromkeys(seeds))


def _values_of(text: str) -> list[str]:
    """What stands between commas, those within a list or a mapping aside."""
    values, depth = [""], 0
    for letter in text:
        depth += (letter in "[{") - (letter in "]}")
        if letter == "," and not depth:
            values.append("")
        else:
            values[-1] += letter
    return [value.strip() for value in values]


def _name(prefix: str, values: Mapping[str, str], seed: int | None) -> str:
    parts = [prefix] if prefix else []
    parts += [f"{key.rpartition('.')[2]}-{value}" for key, value in values.items()]
    if seed is not None:
        parts.append(f"seed-{seed}")
    name = re.sub(r"[^A-Za-z0-9.]+", "-", "_".join(parts) or "run").strip("-.")
    return name[:80] or "run"


def _told_apart(cells: Sequence[Cell]) -> list[Cell]:
    """The cells, each with a name of its own."""
    names = [cell.name for cell in cells]
    if len(set(names)) == len(names):
        return list(cells)
    return [
        dataclasses.replace(cell, name=f"{cell.name}_{number}")
        for number, cell in enumerate(cells, start=1)
    ]
