"""Checks that models, rows, experts and tasks are compatible, before anything is trained."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from dominie.core.distributed import world_size
from dominie.core.errors import InputError
from dominie.data.sources import read_split
from dominie.evaluation.likelihood import candidates
from dominie.evaluation.lm_eval import check_harness
from dominie.evaluation.metrics import METRICS, check_rows
from dominie.evaluation.task import check_group
from dominie.models.attention_hooks import check_attention
from dominie.models.tokenizer_compat import (
    check_context,
    check_same_tokens,
    check_vocabulary,
    token_map,
)
from dominie.recipe import Task
from dominie.stages.run_folder import ChatTokenizers, RunFolder
from dominie.training.settings import training_arguments
from dominie.training.stage_sources import attention_pairs

if TYPE_CHECKING:
    from dominie.stages.train import PreparedTraining, TrainStage


def check_tokens(
    folder: RunFolder, tokenizers: ChatTokenizers, name: str, models: Sequence[str]
) -> None:
    """Refuse teachers of other tokens than the student's, but for those whose tokens are mapped."""
    tokenizer = tokenizers.of(name)
    for other in models[1:]:
        where, theirs = f"stages.{name}, model {other}", tokenizers.of(other)
        if folder.model(other).map_tokens:
            size = folder.info(other).need("vocabulary", use="mapping tokens")
            token_map(tokenizer, theirs, size=size, where=where)
        else:
            check_same_tokens(tokenizer, theirs, where=where)


def check_router(folder: RunFolder, name: str, stage: TrainStage) -> str | None:
    """Refuse a router term for a student without a router.

    Returns:
        A notice of a term that is left out, None if none is.

    Raises:
        InputError: the student is dense.
    """
    terms = [stage.loss_on(source).router for source in stage.active]
    if not any(term and (term.weight or term.z_weight) for term in terms):
        return None
    student = folder.info(stage.student)
    if student.experts is None:
        raise InputError(
            "the loss has a router term and the student no router",
            where=f"stages.{name}.loss.router",
            expected="a student that is a mixture of experts",
            found=f"{stage.student}, which is dense",
            do="remove the term, or make a mixture of the student with an upcycle stage",
        )
    if student.experts == student.experts_per_token and any(term and term.weight for term in terms):
        return (
            f"{name}: each token goes to all {student.experts} experts, so that load balancing is "
            "the same whatever the router does; it is left out"
        )
    return None


def check_training(folder: RunFolder, prepared: PreparedTraining) -> None:
    """Refuse rows, settings and models that are not compatible."""
    stage, where = prepared.stage, f"stages.{prepared.name}"
    known = [name for name in stage.active if name in prepared.sources]
    for name in known:
        if not len(prepared.sources[name].train):
            raise InputError(
                "a source is trained on that is held out whole",
                where=f"{where}.data.{name}",
                do=f"lower data.{name}.test_fraction or validation_fraction",
            )
    trained = [source for source in prepared.stage_sources if source.share]
    validated = len(known) < len(stage.active) or any(len(x.validation) for x in trained)
    if stage.train.validation_decides and not validated:
        raise InputError(
            "there is nothing to choose the best model by",
            where=f"{where}.train",
            expected="a validation split of a source that is trained on, for keep and patience",
            do=f"set data.{stage.active[0]}.validation_fraction",
        )
    # Transformers looks through them now, rather than when the stages before have been trained.
    training_arguments(stage.train, folder.stage(prepared.name), steps=1, ranks=world_size())
    stage.train.micro_batches_ahead(world_size())
    models = {name: folder.info(name) for name in stage.models}
    rows = [split for s in prepared.sources.values() for split in (s.train, s.validation)]
    highest = max((split.highest_id for split in rows), default=0)
    for name, model in models.items():
        check_context(model, stage.train.max_length, where=f"{where}, model {name}")
        check_vocabulary(model, highest, where=f"{where}, model {name}")
    try:
        pairs = attention_pairs(models[stage.student], models, trained)
    except InputError as error:
        raise error.within(where) from None
    if pairs.teachers:
        check_attention(models[stage.student], pairs.student_layers)
    for name in sorted(pairs.teachers):
        check_attention(models[name], pairs.teacher_layers)


def check_alike(folder: RunFolder, models: Sequence[str], *, where: str) -> None:
    """Refuse to combine weights of models whose configurations show them to differ in shape."""
    shape = ("family", "hidden_size", "layers", "heads", "vocabulary")
    seen = {}
    for name in models:
        info = folder.info(name)
        seen[name] = {key: info.need(key, use="combining weights") for key in shape}
    first = next(iter(seen))
    for name, found in seen.items():
        apart = [key for key in shape if found[key] != seen[first][key]]
        if apart:
            raise InputError(
                "models of different shape cannot be combined",
                where=where,
                expected=", ".join(f"{key} {seen[first][key]}" for key in apart)
                + f" as in {first}",
                found=", ".join(f"{key} {found[key]}" for key in apart) + f" in {name}",
                do="name models that were trained from one model",
            )


def check_tasks(
    folder: RunFolder, tokenizers: ChatTokenizers, exists: Callable[[str], bool]
) -> None:
    """Refuse tasks that would fail after everything has been trained.

    Args:
        folder: of the run.
        tokenizers: of its models.
        exists: whether a source can be read; of others the questions are not checked.
    """
    evaluation = folder.recipe.evaluate
    if evaluation is None:
        return
    for name in evaluation.models.values():
        if name not in folder.recipe.stages:
            folder.info(name)
    for name, task in evaluation.tasks.items():
        if task.lm_eval is not None:
            check_harness(task.lm_eval, where=f"evaluate.tasks.{name}")
        if task.source is not None and exists(task.source):
            _check_task(folder, task)
        if task.teacher is None:
            continue
        for model in evaluation.models.values():
            check_same_tokens(
                tokenizers.of(model),
                tokenizers.of(task.teacher),
                where=f"evaluate.tasks.{name}, model {model}, teacher {task.teacher}",
            )
    for name, endpoint in evaluation.endpoints.items():
        endpoint.key(where=f"evaluate.endpoints.{name}")
    for name, benchmark in evaluation.benchmarks.items():
        benchmark.load()
        if not folder.replies(name).exists():
            benchmark.judge.key(where=f"evaluate.benchmarks.{name}.judge")


def check_questions(folder: RunFolder, source: str) -> None:
    """Refuse tasks that cannot be scored on the conversations of a source."""
    for task in folder.recipe.evaluate.tasks.values() if folder.recipe.evaluate else ():
        if task.source == source:
            _check_task(folder, task)


def _check_task(folder: RunFolder, task: Task) -> None:
    assert task.source is not None, "a task of lm_eval brings its own questions"
    conversations = read_split(folder.source(task.source), task.split)
    check_group(conversations, task.by)
    if task.metric == "choice":
        for conversation in conversations[: task.limit]:
            candidates(conversation, task.options)
    elif METRICS[task.metric].score is not None:
        check_rows(task, conversations[: task.limit])
