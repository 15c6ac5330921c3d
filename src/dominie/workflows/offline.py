"""Finds models and data on a hub that cannot be reached, and removes them from the recipe.

A path that is missing on this machine is an error all the same.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TypeVar

from dominie.core.errors import OutOfReach
from dominie.data.sources import content_fingerprint
from dominie.recipe import Evaluation, Recipe
from dominie.recipe.validate import stage_order
from dominie.stages.run_folder import RunFolder

T = TypeVar("T")


@dataclass
class Hidden:
    """The models, sources and stages that cannot be checked, each with the reason.

    Attributes:
        models: that are on the hub, or whose chat template is to be lent by one that is.
        sources: data sets of the hub.
        stages: that need one of these, or a stage that does.
    """

    models: dict[str, str] = field(default_factory=dict)
    sources: dict[str, str] = field(default_factory=dict)
    stages: dict[str, str] = field(default_factory=dict)

    def as_lines(self) -> list[tuple[str, str]]:
        """What was not checked and why: models and data before what needs them."""
        parts = (("model", self.models), ("source", self.sources), ("stage", self.stages))
        return [(f"{kind} {name}", why) for kind, found in parts for name, why in found.items()]


def hidden_parts(folder: RunFolder) -> Hidden:
    """Look up every model and source that a recipe names.

    Raises:
        InputError: one that is missing here, or that the hub refuses.
    """
    recipe, hidden = folder.recipe, Hidden()
    templates: dict[str, bool] = {}
    for name in named_models(recipe):
        try:
            spec = folder.info(name).tokenizer_spec
            if spec is None:  # a server that writes answers
                continue
            templates[name] = (
                spec.chat_template is not None
                or folder.info(name).tokenizer().chat_template is not None
            )
        except OutOfReach as error:
            hidden.models[name] = _why(error)
    if hidden.models and not any(templates.values()):
        without = [name for name, has_one in templates.items() if not has_one]
        lender = next(iter(hidden.models))
        for name in without:
            hidden.models[name] = f"it has no chat template, and {lender} may have one to lend"
    for name in recipe.data:
        try:
            content_fingerprint(folder.source(name))
        except OutOfReach as error:
            hidden.sources[name] = _why(error)
    for name in stage_order(recipe, where=recipe.name):
        stage = recipe.stages[name]
        out_of_sight = hidden.models | hidden.sources | hidden.stages
        needed = [n for n in (*stage.models, *stage.named_sources.values()) if n in out_of_sight]
        if needed:
            hidden.stages[name] = f"it needs {' and '.join(needed)}"
    return hidden


def visible_part(recipe: Recipe, hidden: Hidden) -> Recipe:
    """Remove from the recipe what is hidden."""
    unseen = {*hidden.models, *hidden.stages}
    sources = {*hidden.sources, *(n for n in recipe.made if n in hidden.stages)}
    return dataclasses.replace(
        recipe,
        data=_without(recipe.data, hidden.sources),
        stages=_without(recipe.stages, hidden.stages),
        evaluate=recipe.evaluate and _visible_evaluation(recipe.evaluate, unseen, sources),
    )


def named_models(recipe: Recipe) -> list[str]:
    """List every model of a recipe that no stage makes, each once."""
    names = [model for stage in recipe.stages.values() for model in stage.models]
    if recipe.evaluate is not None:
        names += recipe.evaluate.models.values()
        names += [task.teacher for task in recipe.evaluate.tasks.values() if task.teacher]
    return [name for name in dict.fromkeys(names) if name not in recipe.stages]


def _visible_evaluation(
    evaluation: Evaluation, models: set[str], sources: set[str]
) -> Evaluation | None:
    seen = _without(evaluation.models, {n for n, m in evaluation.models.items() if m in models})
    tasks = {
        name: task
        for name, task in evaluation.tasks.items()
        if task.source not in sources and task.teacher not in models
    }
    if not (seen or evaluation.endpoints) or not (tasks or evaluation.benchmarks):
        return None
    known = {*seen, *evaluation.endpoints}
    baseline = evaluation.baseline if evaluation.baseline in known else None
    return dataclasses.replace(evaluation, models=seen, tasks=tasks, baseline=baseline)


def _without(found: dict[str, T], names: Iterable[str]) -> dict[str, T]:
    dropped = set(names)
    return {name: value for name, value in found.items() if name not in dropped}


def _why(error: OutOfReach) -> str:
    return f"the hub cannot be reached ({error.found})"
