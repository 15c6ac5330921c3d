"""The paths of a recipe, which are relative to its folder, made absolute."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from dominie.data.sources import Source
from dominie.recipe.schema import Recipe
from dominie.recipe.stages import AnyStage, Stage


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
