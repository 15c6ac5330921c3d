"""What a model's placement means to the stages that it teaches."""

from __future__ import annotations

import dataclasses

from dominie.recipe.schema import Recipe
from dominie.recipe.stages import AnyStage, Mixed, Stage


def with_cached_teachers(recipe: Recipe) -> Recipe:
    """The recipe with `placement: cached` written out, as `cache: true` on sources of its stages.

    Those that compare with more than predictions keep the model on the device, and what a stage or
    a source says of its cache itself stands.
    """

    def written_out(stage: Stage, source: str, mixed: Mixed) -> Mixed:
        teacher = stage.teacher_on(source)
        spoken = mixed.cache is not None or (stage.cache is not None and not stage.cache.enabled)
        if spoken or teacher is None or stage.loss_on(source).needs_live_teacher:
            return mixed
        cached = recipe.placement(teacher) == "cached"
        return dataclasses.replace(mixed, cache=True) if cached else mixed

    def stage_with(stage: AnyStage) -> AnyStage:
        if not isinstance(stage, Stage):
            return stage
        data = stage.data.items()
        return dataclasses.replace(
            stage, data={name: written_out(stage, name, mixed) for name, mixed in data}
        )

    stages = {name: stage_with(stage) for name, stage in recipe.stages.items()}
    return dataclasses.replace(recipe, stages=stages)
