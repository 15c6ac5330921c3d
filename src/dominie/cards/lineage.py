"""Where a model comes from: the stages behind it, and the models that they began with."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from dominie.recipe import Recipe, Stage


@dataclass(frozen=True)
class Lineage:
    """The ancestry of a stage's model.

    Attributes:
        stages: in the order in which they ran, the model's own last.
        students: models it began as, that no stage made; of a merge there may be several.
        teachers: models it learnt from, directly or by way of a stage, that no stage made.
    """

    stages: tuple[str, ...]
    students: tuple[str, ...]
    teachers: tuple[str, ...]


def lineage(recipe: Recipe, name: str) -> Lineage:
    """The ancestry of the model that stage `name` makes."""
    needed: set[str] = set()
    waiting = [name]
    while waiting:
        stage = waiting.pop()
        if stage in recipe.stages and stage not in needed:
            needed.add(stage)
            waiting += recipe.stages[stage].models
    order = tuple(stage for stage in recipe.stages if stage in needed)
    students = _began_as(recipe, name)
    others = [
        model
        for stage in order
        for model in recipe.stages[stage].models
        if model not in recipe.stages and model not in students
    ]
    return Lineage(order, tuple(students), tuple(dict.fromkeys(others)))


def _began_as(recipe: Recipe, name: str) -> list[str]:
    """The models at the beginning of the chain of students."""
    if name not in recipe.stages:
        return [name]
    stage = recipe.stages[name]
    parents: Iterable[str] = [stage.student] if isinstance(stage, Stage) else stage.models
    return list(dict.fromkeys(root for parent in parents for root in _began_as(recipe, parent)))


def public_name(recipe: Recipe, name: str) -> str:
    """What to call a model in public: its id on the hub, the last part of a folder's path."""
    if name in recipe.stages:
        return name
    path = recipe.model(name).path
    return Path(path).name if is_private(path) else path


def is_private(path: str) -> bool:
    """Whether a path is a place on this machine, which says nothing to others."""
    return path.startswith(("/", ".", "~")) or Path(path).exists()


def hub_id(recipe: Recipe, name: str) -> str | None:
    """The id of a model on the hub, None where it has none."""
    path = recipe.model(name).path
    return None if is_private(path) or path.startswith("toyworld:") else path
