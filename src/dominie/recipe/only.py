"""A part of a recipe: some of its models, and the stages they need."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Sequence

from dominie.errors import InputError
from dominie.recipe.schema import Recipe


def only_models(recipe: Recipe, names: Sequence[str]) -> Recipe:
    """The recipe with these models alone to score, and the stages that they and the tasks need.

    Args:
        recipe: the whole.
        names: under `evaluate.models`; of stages, where nothing is evaluated.

    Raises:
        InputError: there is no such model.
    """
    evaluation = recipe.evaluate
    known = dict(evaluation.models) if evaluation else {name: name for name in recipe.stages}
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            raise InputError(
                "no such model to train and score",
                where="--only",
                found=name,
                expected=", ".join(known),
                do=f"did you mean {near[0]}?" if near else None,
            )
    needed = [known[name] for name in names]
    if evaluation:
        needed += [task.teacher for task in evaluation.tasks.values() if task.teacher]
    kept: set[str] = set()
    while needed:
        name = needed.pop()
        if name in recipe.stages and name not in kept:
            kept.add(name)
            needed += recipe.stages[name].models
    return dataclasses.replace(
        recipe,
        stages={name: stage for name, stage in recipe.stages.items() if name in kept},
        evaluate=evaluation
        and dataclasses.replace(
            evaluation, models={name: known[name] for name in known if name in names}
        ),
    )
