"""Checks names, order, mixes and paths of a recipe, which types cannot."""

from __future__ import annotations

import re
from collections.abc import Iterable
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import TYPE_CHECKING

from dominie.core.errors import InputError, nearest
from dominie.core.references import references
from dominie.recipe.on_policy_checks import check_on_policy
from dominie.recipe.schema import Recipe
from dominie.recipe.served import check_caches, check_scored, check_served_teachers, refuse_served
from dominie.recipe.shown_answers import check_shown_answers
from dominie.recipe.train_arguments import check_gap

if TYPE_CHECKING:
    from dominie.recipe import TrainStage

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
#: Folders that a run keeps beside its stages.
_RESERVED = {"evaluation", "toyworld", "gguf", "rows", "cache"}


def check_names(recipe: Recipe, *, where: str) -> None:
    """Refuse names that do not exist and settings that contradict each other, before loading.

    Raises:
        InputError: names the key at fault and the nearest name that exists.
    """
    for kind, names in (("name", [recipe.name]), ("stages", recipe.stages), ("data", recipe.data)):
        for name in names:
            _check_is_name(name, where=f"{where}: {kind}")
    if not recipe.stages and not recipe.evaluate:
        raise InputError(
            "nothing to do", where=where, expected="at least one stage, or models to evaluate"
        )
    for key, path in (references(recipe, "path") | references(recipe, "data")).items():
        _check_path(path, where=f"{where}: {key}")
    for name, data in recipe.data.items():
        if data.is_local and (data.subset is not None or data.split != "train"):
            raise InputError(
                "a local file has no subset and no split",
                where=f"{where}: data.{name}",
                do="remove subset and split; use the fractions to hold out rows",
            )
    for name, stage in recipe.stages.items():
        here = f"{where}: stages.{name}"
        for what, others in (("model", recipe.models), ("source", recipe.data)):
            if name in others and (what == "model" or stage.makes == "data"):
                raise InputError(
                    f"the name of a stage and of a {what}", where=here, do="rename one of the two"
                )
        for key, source in stage.named_sources.items():
            _check_source(recipe, source, where=f"{here}.{key}")
        stage.check(recipe, name, where=here)
        for key, model in stage.named.items():
            _check_model(recipe, model, where=f"{here}.{key}")
            if key.rpartition(".")[2] not in stage.served:
                refuse_served(recipe, model, where=f"{here}.{key}")
    stage_order(recipe, where=where)
    _check_evaluation(recipe, where=where)


def stage_order(recipe: Recipe, *, where: str) -> list[str]:
    """Order the stages: each after those it reads models or data of, else as in the recipe.

    Raises:
        InputError: stages that need each other.
    """
    needs = {name: set(recipe.needs(name)) for name in recipe.stages}
    try:
        TopologicalSorter(needs).prepare()
    except CycleError as error:
        circle = " → ".join(reversed(error.args[1]))
        raise InputError(
            "stages need each other",
            where=f"{where}: stages",
            found=circle,
            do="let one of them start from a model",
        ) from None
    order: list[str] = []
    while len(order) < len(needs):
        order.append(
            next(name for name in needs if name not in order and needs[name] <= set(order))
        )
    return order


def _check_is_name(name: str, *, where: str) -> None:
    if (
        not _NAME.fullmatch(name)
        or name.casefold() in _RESERVED  # some file systems know no capitals
        or name.casefold().endswith((".yaml", ".json", ".jsonl", ".html"))
    ):
        raise InputError(
            "not usable as a name",
            where=where,
            found=repr(name),
            expected=f"letters, digits, - _ . and none of {', '.join(sorted(_RESERVED))}",
        )


def _check_path(path: str, *, where: str) -> None:
    if not path.strip():
        raise InputError("the path is empty", where=where, expected="a folder, file or hub id")


def check_training_stage(recipe: Recipe, name: str, stage: TrainStage, *, where: str) -> None:
    """Refuse a mix of nothing, a loss without its teacher, a cache that cannot serve."""
    _check_mix(name, stage, where=where)
    check_served_teachers(recipe, stage, where=where)
    check_caches(stage, where=where)
    _check_adapter(recipe, stage, where=where)
    check_on_policy(recipe, stage, where=where)
    check_shown_answers(recipe, stage, where=where)
    if stage.train.balance.gap is not None:
        check_gap(
            {source: stage.loss_on(source) for source in stage.active},
            {source: stage.teacher_on(source) for source in stage.active},
            reference_sources(recipe, stage),
            one_source_a_step=stage.train.mixing == "steps",
            where=where,
        )
    if stage.student in recipe.models:
        adapters = stage.train.lora is not None
        recipe.model(stage.student).check_trainable(
            adapters=adapters, where=f"{where}.student: {stage.student}"
        )


def reference_sources(recipe: Recipe, stage: TrainStage) -> frozenset[str]:
    """The sources whose teacher is what the student starts as, under this name or another."""

    def weights(name: str | None) -> tuple[str | None, ...]:
        if name is None or name in recipe.served or name not in recipe.models:
            return name, None, None
        spec = recipe.model(name)
        return spec.path, spec.adapter, spec.revision

    start = weights(stage.student)
    plain = (s for s in stage.active if stage.shown_on(s) is None)
    return frozenset(s for s in plain if weights(stage.teacher_on(s)) == start)


def _check_mix(name: str, stage: TrainStage, *, where: str) -> None:
    if stage.loss is None and not all(mixed.loss for mixed in stage.data.values()):
        raise InputError(
            "no loss", where=f"{where}.loss", expected="a loss for the stage or for each source"
        )
    if not stage.active:
        raise InputError(
            "the mix holds nothing",
            where=f"{where}.data",
            expected="shares that sum to more than 0",
            do="give at least one source a share above 0",
        )
    for source in stage.active:
        if stage.loss_on(source).needs_teacher and stage.teacher_on(source) is None:
            raise InputError(
                "the loss compares with a teacher and there is none",
                where=f"{where}.data.{source}",
                do=f"set stages.{name}.teacher, or teacher on the source, or use next_token alone",
            )


def _check_adapter(recipe: Recipe, stage: TrainStage, *, where: str) -> None:
    """Refuse to change the shape of another stage's adapter that this one goes on training."""
    before = recipe.trained.get(stage.student)
    mine, theirs = stage.train.lora, before.train.lora if before else None
    if mine is None or theirs is None or mine.merge or theirs.merge:
        return
    for key in ("r", "alpha", "target_modules", "modules_to_save"):
        if getattr(mine, key) != getattr(theirs, key):
            raise InputError(
                "a stage that goes on from an adapter cannot change its shape",
                where=f"{where}.train.lora.{key}",
                expected=f"{getattr(theirs, key)}, as in stages.{stage.student}",
                found=str(getattr(mine, key)),
                do="make them equal, or set lora.merge: true to train a new adapter over "
                "merged weights",
            )


def _check_source(recipe: Recipe, source: str, *, where: str) -> None:
    if source in recipe.sources:
        return
    if source in recipe.stages:
        raise InputError(
            f"stage {source} makes a model and no data",
            where=where,
            expected=f"one of {', '.join(recipe.sources)}",
        )
    raise _unknown("source", source, recipe.sources, where=where)


def _check_model(recipe: Recipe, name: str, *, where: str) -> None:
    """Accept a stage, a name under models, a folder, a toy model, or an organisation/model id."""
    _check_path(name, where=where)
    if name in recipe.made:
        raise InputError(
            f"stage {name} makes data and no model",
            where=where,
            expected="a model, or a stage that makes one",
            do="name it among the data of a stage, or as the source of a task",
        )
    if (
        name in recipe.stages
        or name in recipe.models
        or name.startswith("toyworld:")
        or Path(name).exists()
    ):
        return
    if name.startswith((".", "/", "~")):
        raise InputError("no such folder", where=where, found=name)
    if name.count("/") != 1:
        raise _unknown("stage or model", name, [*recipe.stages, *recipe.models], where=where)


def _check_evaluation(recipe: Recipe, *, where: str) -> None:
    if recipe.evaluate is None:
        return
    here = f"{where}: evaluate"
    for name, model in recipe.evaluate.models.items():
        _check_is_name(name, where=f"{here}.models")
        _check_model(recipe, model, where=f"{here}.models.{name}")
        check_scored(recipe, model, where=f"{here}.models.{name}")
    for name in recipe.evaluate.endpoints:
        _check_is_name(name, where=f"{here}.endpoints")
        if name in recipe.evaluate.models:
            raise InputError("the name of a model and of an endpoint", where=f"{here}.{name}")
    for name in recipe.evaluate.benchmarks:
        _check_is_name(name, where=f"{here}.benchmarks")
        if name.casefold() == "replies" and recipe.evaluate.endpoints:
            raise InputError(
                "a benchmark of this name would overwrite the replies of endpoints",
                where=f"{here}.benchmarks",
                found=repr(name),
                do="rename the benchmark",
            )
        if name in recipe.evaluate.tasks:
            raise InputError("the name of a task and of a benchmark", where=f"{here}.{name}")
    for name, task in recipe.evaluate.tasks.items():
        _check_is_name(name, where=f"{here}.tasks")
        if task.source is None:
            continue
        _check_source(recipe, task.source, where=f"{here}.tasks.{name}.source")
        fraction = f"{task.split}_fraction"
        if getattr(recipe.sources[task.source], fraction) == 0:
            stage = recipe.stages.get(task.source)
            key = f"{'data' if stage is None else 'stages'}.{task.source}.{fraction}"
            raise InputError(
                f"source {task.source} has no {task.split} split",
                where=f"{here}.tasks.{name}",
                do=f"set {key}"
                if stage is None or hasattr(stage, fraction)
                else f"name a source under data: a stage of kind {stage.kind} holds nothing out",
            )
        if task.teacher is not None:
            _check_model(recipe, task.teacher, where=f"{here}.tasks.{name}.teacher")
            refuse_served(recipe, task.teacher, where=f"{here}.tasks.{name}.teacher")


def _unknown(what: str, name: str, known: Iterable[str], *, where: str) -> InputError:
    known = list(known)
    near = nearest(name, known)
    do = f"did you mean {near}?" if near else None
    if what == "stage or model" and not near:
        do = (
            f"a hub model without an organisation is declared: models: {{{name}: {{path: {name}}}}}"
        )
    return InputError(
        f"unknown {what} {name!r}",
        where=where,
        expected=f"one of {', '.join(known)}" if known else None,
        do=do,
    )
