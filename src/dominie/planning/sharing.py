"""Which teachers of a stage are adapters over its student's base, known from the recipe alone."""

from __future__ import annotations

from dominie.models.folders import base_and_adapter
from dominie.recipe import Recipe, Stage


def adapter_over_base(recipe: Recipe, stage: Stage, teacher: str) -> tuple[bool, str | None]:
    """Whether a teacher's base is the one the student trains over, and its adapter's name.

    As `dominie.models.minds.sharing` finds it on the disk, before anything is there: however many
    adapters lie over a base, one of them over another perhaps, the base is held once. None is the
    bare base, with what is merged into it.
    """
    lora = stage.train.lora
    if lora is None:
        return False, None
    base, worn = _base_and_adapter(recipe, stage.student)
    merged = worn if lora.merge else None  # an adapter that goes on being trained is not merged
    place, adapter = _base_and_adapter(recipe, teacher)
    if place != base:
        return False, None
    if adapter == merged:
        return True, None
    return (True, adapter) if adapter is not None and merged is None else (False, None)


def _base_and_adapter(recipe: Recipe, name: str) -> tuple[str, str | None]:
    if name not in recipe.stages:
        return base_and_adapter(recipe.model(name))
    made_by = recipe.trained.get(name)
    if made_by is None or made_by.train.lora is None or made_by.train.lora.merge:
        return name, None
    return _base_and_adapter(recipe, made_by.student)[0], name
