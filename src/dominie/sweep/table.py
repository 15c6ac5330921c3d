"""The results of a sweep as rows: one for every run, model and task."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dominie.recipe import Recipe
from dominie.running.folder import read_stage
from dominie.sweep.cells import Cell


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
    try:
        results = json.loads((run / "results.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        return []  # nothing is evaluated
    return [
        Row(cell=cell, model=model, task=task, result=result, **_cost(recipe, run, model))
        for model, tasks in results.items()
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
