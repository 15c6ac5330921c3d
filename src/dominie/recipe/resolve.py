"""A recipe's paths made absolute, its cached placements written out, and a part of it chosen."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dominie.core.errors import InputError
from dominie.data.sources import Source
from dominie.recipe.schema import Recipe
from dominie.recipe.stage_configs import AnyStage, Mixed, Stage


def with_absolute_paths(recipe: Recipe, base: Path) -> Recipe:
    """Make what exists relative to the recipe's folder absolute; anything else keeps its name.

    A data file that lies nowhere is missed in the recipe's folder, where it belongs.
    """

    def resolved(path: str, *, is_local: bool = False) -> str:
        if not path.strip() or path.startswith("toyworld:"):
            return path
        local = base / Path(path).expanduser()
        missed = is_local and not Path(path).expanduser().exists()
        return str(local.resolve()) if missed or local.exists() else path

    def resolved_source(source: Source) -> Source:
        return replace(source, path=resolved(source.path, is_local=source.is_local))

    def with_files(benchmark: Any) -> Any:
        named = {key: getattr(benchmark, key) for key in benchmark.files}
        return replace(benchmark, **{k: path and resolved(path) for k, path in named.items()})

    def resolved_name(name: str) -> str:
        return name if name in recipe.stages or name in recipe.models else resolved(name)

    def resolved_optional(name: str | None) -> str | None:
        return name and resolved_name(name)

    def resolved_stage(stage: AnyStage) -> AnyStage:
        stage = stage.renamed(resolved_name)
        if not isinstance(stage, Stage) or stage.cache is None or stage.cache.folder is None:
            return stage
        # Unlike other paths, it need not exist yet.
        place = (base / Path(stage.cache.folder).expanduser()).absolute()
        return replace(stage, cache=replace(stage.cache, folder=str(place)))

    replace = dataclasses.replace
    return replace(
        recipe,
        data={name: resolved_source(source) for name, source in recipe.data.items()},
        models={name: model.located(resolved) for name, model in recipe.models.items()},
        stages={name: resolved_stage(stage) for name, stage in recipe.stages.items()},
        evaluate=recipe.evaluate
        and replace(
            recipe.evaluate,
            models={name: resolved_name(model) for name, model in recipe.evaluate.models.items()},
            tasks={
                n: replace(
                    t,
                    teacher=resolved_optional(t.teacher),
                    lm_eval=t.lm_eval
                    and replace(
                        t.lm_eval, include=t.lm_eval.include and resolved(t.lm_eval.include)
                    ),
                )
                for n, t in recipe.evaluate.tasks.items()
            },
            benchmarks={n: with_files(b) for n, b in recipe.evaluate.benchmarks.items()},
        ),
    )


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
