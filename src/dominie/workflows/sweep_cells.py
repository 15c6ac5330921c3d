"""The cells of a sweep, their results as rows, and values chosen by validation only."""

from __future__ import annotations

import csv
import dataclasses
import hashlib
import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dominie.core.errors import InputError
from dominie.core.run_reader import read_results, read_stage
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


@dataclass(frozen=True, kw_only=True)
class Row:
    """A score of one model of one run.

    Attributes:
        cell: the run.
        model: its name under `evaluate.models`.
        task: what it was scored on.
        result: the entry of `results.json`.
        steps: optimiser steps of the stage that made it, None for a model that no stage trained.
        tokens: supervised tokens, likewise.
        seconds: likewise.
    """

    cell: Cell
    model: str
    task: str
    result: Mapping[str, Any]
    steps: int | None = None
    tokens: int | None = None
    seconds: float | None = None

    @property
    def score(self) -> float:
        """From 0 to 1."""
        return float(self.result["score"])

    def flat(self) -> dict[str, Any]:
        """The row as a table writes it."""
        kept = {
            key: round(value, 6) if isinstance(value, float) else value
            for key, value in self.result.items()
            if isinstance(value, int | float)
        }
        return {
            "run": self.cell.name,
            **self.cell.values,
            "seed": self.cell.seed,
            "model": self.model,
            "task": self.task,
            **kept,
            "steps": self.steps,
            "tokens": self.tokens,
            "seconds": self.seconds,
        }


def rows_of(cell: Cell, folder: Path) -> list[Row]:
    """Everything a finished run scored, with what each model's own stage cost."""
    recipe, run = cell.loaded(), folder / cell.name
    return [
        Row(cell=cell, model=model, task=task, result=result, **_cost(recipe, run, model))
        for model, tasks in read_results(run).items()
        for task, result in tasks.items()
    ]


def _cost(recipe: Recipe, run: Path, model: str) -> dict[str, Any]:
    name = recipe.evaluate.models[model] if recipe.evaluate else model
    if name not in recipe.stages:
        return {}
    record = read_stage(run / name)
    return {
        "steps": record.get("steps"),
        "tokens": record.get("supervised_tokens"),
        "seconds": record.get("seconds"),
    }


def write_csv(rows: Iterable[Row], path: Path) -> None:
    """All rows as CSV, replaced in one step."""
    flat = [row.flat() for row in rows]
    columns = list(dict.fromkeys(key for row in flat for key in row))
    cost: list[str] = [key for key in ("steps", "tokens", "seconds") if key in columns]
    columns = [key for key in columns if key not in cost] + cost
    scratch = path.with_name(f".{path.name}")
    with scratch.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(flat)
    scratch.replace(path)


def points(rows: Sequence[Row]) -> dict[tuple[tuple[str, ...], str], dict[str, list[float]]]:
    """Scores over seeds: (values of the grid, model) → task → one score for each run."""
    found: dict[tuple[tuple[str, ...], str], dict[str, list[float]]] = {}
    for row in rows:
        key = (tuple(row.cell.values.values()), row.model)
        found.setdefault(key, {}).setdefault(row.task, []).append(row.score)
    return found


def check_selection(recipe: Recipe, tasks: Sequence[str]) -> None:
    """Refuse to choose by what the choice is later judged by.

    Raises:
        InputError: a task does not exist, or is scored on the test split.
    """
    known = recipe.evaluate.tasks if recipe.evaluate else {}
    for name in tasks:
        if name not in known:
            raise InputError(
                "no such task to choose by",
                where="--best-by",
                found=name,
                expected=", ".join(known) or "a task under evaluate.tasks",
            )
        if known[name].split == "test":
            raise InputError(
                "values are not chosen on the test split: its scores would no longer be a test",
                where=f"--best-by {name}",
                expected="a task with split: validation",
                do=f"add one: evaluate.tasks.{name}_validation={{source: {known[name].source}, "
                "split: validation}",
            )


def best_cells(rows: Sequence[Row], tasks: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """For each model the point of the grid with the highest mean over these tasks and all seeds.

    Of equal points the first one is taken.
    """
    best: dict[str, tuple[float, tuple[str, ...]]] = {}
    for (values, model), scores in points(rows).items():
        if not all(scores.get(task) for task in tasks):
            continue
        mean = sum(sum(scores[task]) / len(scores[task]) for task in tasks) / len(tasks)
        if model not in best or mean > best[model][0]:
            best[model] = (mean, values)
    return {model: values for model, (_, values) in best.items()}
