"""Choosing values by a sweep: on validation only."""

from __future__ import annotations

from collections.abc import Sequence

from dominie.errors import InputError
from dominie.recipe import Recipe
from dominie.sweep.table import Row, points


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
