"""Model cards: `model/README.md` of every stage, from its recipe, record and results."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dominie.core.io import write_atomic
from dominie.core.references import Kind, rewritten
from dominie.core.results_file import read_results
from dominie.core.run_reader import read_stage
from dominie.core.task_result import Interval, TaskResult, in_nats
from dominie.losses.terms import LossTerms
from dominie.models.model_folder import is_model
from dominie.recipe import Recipe, dump_recipe
from dominie.stages.run_folder import RunFolder
from dominie.toyworld import is_toyworld
from dominie.workflows.lineage import (
    Lineage,
    hub_id,
    is_private,
    licence_of,
    lineage,
    public_name,
    rounding,
    warnings,
)

if TYPE_CHECKING:
    from huggingface_hub import ModelCardData

_TEMPLATE = Path(__file__).with_name("model_card.md.j2")
_OURS = "<!-- written by dominie, and again at each run: remove this line to keep your edits -->"
_FORM = "[More Information Needed]"  # in the card that peft leaves to be filled in

#: By task, the figures of `results.json`.
_Results = Mapping[str, Mapping[str, Any]]


def write_cards(folder: RunFolder, *, scored: bool) -> list[Path]:
    """Write `model/README.md` of finished stages.

    A card that somebody has taken over, by removing the line that says who wrote it, stays.

    Args:
        scored: whether `results.json` is of the models as they are now: every card is then written
            with its figures. Else those that are missing are, without any.

    Returns:
        The cards that were written.
    """
    written = []
    for name in folder.recipe.stages:
        model = folder.stage(name) / "model"
        if read_stage(folder.stage(name)).get("status") != "done" or not is_model(model):
            continue
        card = model / "README.md"
        found = card.read_text(encoding="utf-8") if card.is_file() else _FORM
        if _FORM in found or (scored and _OURS in found):
            write_atomic(card, _card(folder, name, scored=scored))
            written.append(card)
    return written


def _card(folder: RunFolder, name: str, *, scored: bool) -> str:
    """The text of a card, its metadata on top."""
    from huggingface_hub import ModelCard

    recipe, record = folder.recipe, read_stage(folder.stage(name))
    ancestry = lineage(recipe, name)
    adapter = (folder.stage(name) / "model" / "adapter_config.json").is_file()
    results, baseline, theirs = _results(folder, name) if scored else ({}, None, {})
    students = [public_name(recipe, student) for student in ancestry.students]
    licence = _licence(recipe, ancestry.students[0])
    others = {
        public_name(recipe, model): _licence(recipe, model)
        for model in (*ancestry.students[1:], *ancestry.teachers)
        if not _is_toy(recipe, model)  # of a toy model there is nobody to be asked
    }
    own = None if _is_toy(recipe, ancestry.students[0]) else students[0]
    card = ModelCard.from_template(
        _metadata(recipe, name, ancestry, licence=licence, adapter=adapter, results=results),
        template_path=str(_TEMPLATE),
        mark=_OURS,
        run=recipe.name,
        stage=name,
        adapter=adapter,
        students=students,
        rounded={
            public_name(recipe, model): found
            for model in (*ancestry.students, *ancestry.teachers)
            if (found := rounding(recipe, model))
        },
        teachers=[public_name(recipe, teacher) for teacher in ancestry.teachers],
        results=results,
        baseline=baseline,
        baseline_results=theirs,
        stages=[row for stage in ancestry.stages for row in _rows(recipe, stage)],
        record=record,
        losses=record.get("final", {}).get("evaluation", {}),
        licence=licence,
        warnings=warnings(licence, others, own),
        recipe=_public_recipe(recipe, ancestry),
        score=_score,
        count=lambda n: f"{n:,.0f}" if isinstance(n, int | float) else "",
        number=lambda n: f"{n:.3f}" if isinstance(n, int | float) else "",
        percent=lambda n: f"{100 * n:.1f}" if isinstance(n, int | float) else "",
    )
    return f"{card}\n"


def _metadata(
    recipe: Recipe,
    name: str,
    ancestry: Lineage,
    *,
    licence: str | None,
    adapter: bool,
    results: _Results,
) -> ModelCardData:
    """What the hub reads of a card."""
    from huggingface_hub import EvalResult, ModelCardData

    ids = [found for student in ancestry.students if (found := hub_id(recipe, student))]
    tags = [tag for stage in ancestry.stages for tag in recipe.stages[stage].hub_tags]
    relation = "adapter" if adapter else recipe.stages[name].relation
    evaluated = [
        EvalResult(
            task_type="text-generation",
            task_name=task,
            dataset_name=_dataset_of(recipe, task),
            dataset_type=_dataset_of(recipe, task).replace(" ", "-"),
            metric_type="kl" if _kl(found) else str(found.get("metric", "score")),
            metric_value=found["kl"] if _kl(found) else found["score"],
        )
        for task, found in results.items()
    ]
    return ModelCardData(
        license=licence,
        base_model=(ids[0] if len(ids) == 1 else ids) or None,
        base_model_relation=relation if ids else None,
        library_name="peft" if adapter else "transformers",
        pipeline_tag="text-generation",
        tags=list(dict.fromkeys(["dominie", *tags])),
        datasets=_public_datasets(recipe, ancestry) or None,
        model_name=f"{recipe.name}-{name}" if evaluated else None,
        eval_results=evaluated or None,
    )


def _public_datasets(recipe: Recipe, ancestry: Lineage) -> list[str]:
    """The sources on the hub that the model's stages read."""
    sources = [
        recipe.data[source]
        for stage in ancestry.stages
        for source in recipe.stages[stage].sources
        if source in recipe.data
    ]
    public = [s.path for s in sources if not s.is_local and not is_toyworld(s.path)]
    return list(dict.fromkeys(public))


def _dataset_of(recipe: Recipe, task: str) -> str:
    """The source and split that a task takes its questions from, else its own name."""
    tasks = recipe.evaluate.tasks if recipe.evaluate else {}
    if task in tasks and tasks[task].source:
        return f"{tasks[task].source} {tasks[task].split}"
    return task


def _rows(recipe: Recipe, name: str) -> list[list[str]]:
    """The rows of a stage in the table of all stages behind a model."""
    if name not in recipe.trained:
        stage = recipe.stages[name]
        models = ", ".join(public_name(recipe, model) for model in stage.models)
        return [
            [name, models, ": ".join(filter(None, [stage.kind, ", ".join(stage.sources)])), "", ""]
        ]
    trained = recipe.trained[name]
    return [
        [
            name,
            public_name(recipe, trained.student),
            f"{source} ({trained.data[source].share:g})",
            public_name(recipe, teacher) if teacher else "its own labels",
            _terms(trained.loss_on(source)),
        ]
        for source in trained.active
        for teacher in [trained.teacher_on(source)]
    ]


def _terms(terms: LossTerms) -> str:
    return " + ".join(
        f"{term.weight:g} {name}" for name, term in terms.present.items() if term.weighs
    )


def _public_recipe(recipe: Recipe, ancestry: Lineage) -> str:
    """The part of the recipe that a model depends on, with names of files instead of paths."""

    def named(kind: Kind, text: str) -> str:
        if kind == "model":
            return public_name(recipe, text) if "/" in text else text
        is_place = kind == "output" or (kind != "source" and is_private(text))
        return text.rstrip("/").rpartition("/")[2] if is_place else text

    stages = {stage: recipe.stages[stage] for stage in ancestry.stages}
    return dump_recipe(rewritten(dataclasses.replace(recipe, evaluate=None, stages=stages), named))


def _results(folder: RunFolder, name: str) -> tuple[_Results, str | None, _Results]:
    """The results of a stage's model, the name of the baseline and its results."""
    evaluation, results = folder.recipe.evaluate, read_results(folder.path)
    names = evaluation.models.items() if evaluation else ()
    evaluated = next((own for own, model in names if model == name), None)
    if evaluation is None or evaluated is None or evaluated not in results:
        return {}, None, {}
    baseline = evaluation.baseline or next(iter(results))
    theirs = results.get(baseline, {})
    beside = baseline if baseline != evaluated and theirs else None
    return results[evaluated], beside, theirs


def _score(result: Mapping[str, Any] | None) -> str:
    if result is None:
        return ""
    if kl := _kl(result):
        return in_nats(kl)
    interval, score = result.get("interval"), f"{100 * result['score']:.1f}"
    return f"{score} ({100 * interval[0]:.1f} to {100 * interval[1]:.1f})" if interval else score


def _kl(result: Mapping[str, Any]) -> Interval | None:
    """How far the model moved from its base, if that is what was measured."""
    read = TaskResult.from_dict(result)
    return None if read is None else read.kl


def _is_toy(recipe: Recipe, model: str) -> bool:
    return model not in recipe.served and is_toyworld(recipe.model(model).path)


def _licence(recipe: Recipe, model: str) -> str | None:
    if model in recipe.served or _is_toy(recipe, model):
        return None
    return licence_of(recipe.model(model))
