"""The YAML at the top of a model card, as the hub reads it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dominie.cards.lineage import Lineage, hub_id
from dominie.recipe import Recipe, Stage, UpcycleStage


def metadata(
    recipe: Recipe,
    name: str,
    ancestry: Lineage,
    *,
    licence: str | None,
    adapter: bool,
    results: Mapping[str, Mapping[str, Any]],
) -> str:
    """The metadata of a stage's model, between its two lines of dashes.

    Args:
        recipe: the resolved recipe.
        name: of the stage.
        ancestry: of its model.
        licence: inherited; None leaves the field out.
        adapter: whether the model is an adapter over another's weights.
        results: by task.
    """
    from huggingface_hub import EvalResult, ModelCardData

    ids = [found for student in ancestry.students if (found := hub_id(recipe, student))]
    fields: dict[str, Any] = {
        "license": licence,
        "base_model": (ids[0] if len(ids) == 1 else ids) or None,
        "base_model_relation": _relation(recipe, name, adapter) if ids else None,
        "library_name": "peft" if adapter else "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["dominie", *_tags(recipe, ancestry)],
        "datasets": _datasets(recipe, ancestry) or None,
    }
    evaluated = [
        EvalResult(
            task_type="text-generation",
            task_name=task,
            dataset_name=_asked(recipe, task),
            dataset_type=_asked(recipe, task).replace(" ", "-"),
            metric_type=str(found.get("metric", "score")),
            metric_value=found["score"],
        )
        for task, found in results.items()
    ]
    if evaluated:
        fields |= {"model_name": f"{recipe.name}-{name}", "eval_results": evaluated}
    return f"---\n{ModelCardData(**fields).to_yaml()}\n---\n"


def _relation(recipe: Recipe, name: str, adapter: bool) -> str:
    if adapter:
        return "adapter"
    return "finetune" if isinstance(recipe.stages[name], Stage | UpcycleStage) else "merge"


def _tags(recipe: Recipe, ancestry: Lineage) -> list[str]:
    """What was done on the way, in the hub's words."""
    tags = []
    for name in ancestry.stages:
        stage = recipe.stages[name]
        if not isinstance(stage, Stage):
            tags.append("merge" if stage.kind == "merge" else "moe")
            continue
        teachers = {stage.teacher_on(source) for source in stage.active} - {None}
        if teachers:
            tags.append("knowledge-distillation")
        if len(teachers) > 1:
            tags.append("domain-alignment-from-expert")
    return list(dict.fromkeys(tags))


def _datasets(recipe: Recipe, ancestry: Lineage) -> list[str]:
    read = [
        recipe.data[source]
        for name in ancestry.stages
        if isinstance(stage := recipe.stages[name], Stage)
        for source in stage.active
    ]
    public = [s.path for s in read if not s.is_local and not s.path.startswith("toyworld:")]
    return list(dict.fromkeys(public))


def _asked(recipe: Recipe, task: str) -> str:
    """Whose questions a task asks."""
    tasks = recipe.evaluate.tasks if recipe.evaluate else {}
    if task in tasks and tasks[task].source:
        return f"{tasks[task].source} {tasks[task].split}"
    return task
