"""The trials of a sweep, their scores as rows, and the best values by validation scores."""

from __future__ import annotations

import csv
import dataclasses
import functools
import hashlib
import io
import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dominie.core.errors import InputError
from dominie.core.io import write_atomic
from dominie.core.results_file import read_results
from dominie.core.run_reader import read_stage
from dominie.recipe import Recipe, dump_recipe, load_recipe, only_models


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One run of a sweep: a point of the grid under a seed.

    Attributes:
        name: of its run folder in the sweep's.
        recipe: the recipe's file.
        seed: `train.seed` of the run; None leaves the recipe's.
        values: of the keys that the sweep varies.
        fixed: further overrides, the same for the whole sweep.
        only: the models that are scored; empty is all.
    """

    name: str
    recipe: Path
    seed: int | None = None
    values: Mapping[str, str] = field(default_factory=dict)
    fixed: tuple[str, ...] = ()
    only: tuple[str, ...] = ()

    @property
    def overrides(self) -> list[str]:
        """All overrides of the recipe."""
        seed = [] if self.seed is None else [f"train.seed={self.seed}"]
        varied = [f"{key}={value}" for key, value in self.values.items()]
        return [*self.fixed, *varied, *seed, f"name={self.name}"]

    def loaded(self) -> Recipe:
        """The recipe as the run will read it, read once.

        Raises:
            InputError: a value of the trial cannot be used.
        """
        return self._recipe

    @functools.cached_property
    def _recipe(self) -> Recipe:
        recipe = load_recipe(self.recipe, self.overrides)
        return only_models(recipe, self.only) if self.only else recipe

    def digest(self) -> str:
        """Return a hash of the resolved recipe."""
        return hashlib.blake2b(dump_recipe(self.loaded()).encode(), digest_size=8).hexdigest()


def grid(
    recipe: Path,
    over: Sequence[str],
    *,
    seeds: Sequence[int | None] = (None,),
    fixed: Sequence[str] = (),
    only: Sequence[str] = (),
    prefix: str = "",
) -> list[Trial]:
    """Return a trial for every combination of the values and seeds; seeds vary fastest.

    Neighbours then share the fewest stages, and no run waits for another one's stage.

    Args:
        over: `a.b.c=1,2,3` each.
        fixed: overrides of all runs.
        only: the models that are scored; empty is all.
        prefix: of the names of runs.

    Raises:
        InputError: a list of values cannot be parsed.
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
    trials = [
        Trial(
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
    if len({trial.name for trial in trials}) == len(trials):
        return trials
    return [  # some differ only in characters that a name cannot have
        dataclasses.replace(trial, name=f"{trial.name}_{number}")
        for number, trial in enumerate(trials, start=1)
    ]


def seeds_of(text: str) -> list[int]:
    """Parse seeds: `0-4`, `3` or `0,2,5-7`.

    Raises:
        InputError: the text is none of these.
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
    """Split at commas outside of lists and mappings."""
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


@dataclass(frozen=True, kw_only=True)
class Row:
    """The score of one model on one task in one run.

    Attributes:
        trial: the run.
        model: its name under `evaluate.models`.
        task: its name.
        result: the entry of `results.json`.
        steps: optimiser steps of the stage that made the model; None if no stage trained it.
        tokens: its supervised tokens.
        seconds: its training time.
    """

    trial: Trial
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
        """Return the row as a flat mapping, for CSV and JSON."""
        kept = {
            key: round(value, 6) if isinstance(value, float) else value
            for key, value in self.result.items()
            if isinstance(value, int | float)
        }
        return {
            "run": self.trial.name,
            **self.trial.values,
            "seed": self.trial.seed,
            "model": self.model,
            "task": self.task,
            **kept,
            "steps": self.steps,
            "tokens": self.tokens,
            "seconds": self.seconds,
        }


def rows_of(trial: Trial, folder: Path) -> list[Row]:
    """Return all scores of a finished run, with the cost of each model's stage."""
    recipe, run = trial.loaded(), folder / trial.name
    return [
        Row(trial=trial, model=model, task=task, result=result, **_cost(recipe, run, model))
        for model, tasks in read_results(run).items()
        if recipe.evaluate is None or model in recipe.evaluate.scored
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
    """Write rows as CSV, atomically."""
    flat = [row.flat() for row in rows]
    columns = list(dict.fromkeys(key for row in flat for key in row))
    cost: list[str] = [key for key in ("steps", "tokens", "seconds") if key in columns]
    columns = [key for key in columns if key not in cost] + cost
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(flat)
    write_atomic(path, text.getvalue())


def points(rows: Sequence[Row]) -> dict[tuple[tuple[str, ...], str], dict[str, list[float]]]:
    """Group scores: (values of the grid, model) → task → a score for each seed."""
    found: dict[tuple[tuple[str, ...], str], dict[str, list[float]]] = {}
    for row in rows:
        key = (tuple(row.trial.values.values()), row.model)
        found.setdefault(key, {}).setdefault(row.task, []).append(row.score)
    return found


def check_selection(recipe: Recipe, tasks: Sequence[str]) -> None:
    """Refuse to choose values by scores on a test split.

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


def best_values(rows: Sequence[Row], tasks: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """Return for each model the values with the highest mean score over tasks and seeds.

    Of equal means the first counts.
    """
    best: dict[str, tuple[float, tuple[str, ...]]] = {}
    for (values, model), scores in points(rows).items():
        if not all(scores.get(task) for task in tasks):
            continue
        mean = sum(sum(scores[task]) / len(scores[task]) for task in tasks) / len(tasks)
        if model not in best or mean > best[model][0]:
            best[model] = (mean, values)
    return {model: values for model, (_, values) in best.items()}
