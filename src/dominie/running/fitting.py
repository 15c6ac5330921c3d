"""Whether a recipe's models, rows and tasks go together, before anything is trained."""

from __future__ import annotations

from collections.abc import Sequence

from dominie.data.conversations import Conversation
from dominie.data.splits import read_split
from dominie.errors import InputError
from dominie.evaluation.exams import exam
from dominie.evaluation.harness import check_harness
from dominie.evaluation.likelihood import candidates
from dominie.evaluation.metrics import check_rows
from dominie.evaluation.questions import check_group
from dominie.evaluation.scoring import UNGENERATED
from dominie.models.agreement import check_context, check_same_tokens, check_vocabulary
from dominie.models.attention_interface import check_attention
from dominie.models.loading import load_config
from dominie.processes.ranks import ranks
from dominie.recipe import Task
from dominie.running.chat_tokenizers import ChatTokenizers
from dominie.running.folder import RunFolder
from dominie.running.prepared import PreparedTraining
from dominie.training.arguments import training_arguments
from dominie.training.lessons import layer_pairs


def check_fit(folder: RunFolder, prepared: PreparedTraining) -> None:
    """Refuse what rows, settings and configurations show not to go together."""
    stage, where = prepared.stage, f"stages.{prepared.name}"
    for name in stage.active:
        if not len(prepared.sources[name].train):
            raise InputError(
                "a source is trained on that is held out whole",
                where=f"{where}.data.{name}",
                do=f"lower data.{name}.test_fraction or validation_fraction",
            )
    lessons = prepared.lessons
    if stage.train.validation_decides and not any(
        len(lesson.validation) for lesson in lessons if lesson.share
    ):
        raise InputError(
            "there is nothing to tell the best model by",
            where=f"{where}.train",
            expected="a validation split of a source that is trained on, for keep and patience",
            do=f"set data.{stage.active[0]}.validation_fraction",
        )
    # Transformers looks through them now, rather than when the stages before have been trained.
    training_arguments(stage.train, folder.stage(prepared.name), steps=1, ranks=ranks())
    stage.train.micro_batches_ahead(ranks())
    configs = {model: load_config(folder.model(folder.root(model))) for model in stage.models}
    highest = max(
        max(s.train.highest_id, s.validation.highest_id) for s in prepared.sources.values()
    )
    for model, config in configs.items():
        check_context(config, stage.train.max_length, where=f"{where}, model {model}")
        check_vocabulary(config, highest, where=f"{where}, model {model}")
    taught = [lesson for lesson in lessons if lesson.share]
    try:
        pairs, _ = layer_pairs(configs[stage.student], configs, taught)
    except InputError as error:
        raise error.within(where) from None
    if pairs:
        check_attention(configs[stage.student], {student for student, _ in pairs})
        compared = {x.teacher for x in taught if x.teacher and x.terms.weighs("attention")}
        for name in sorted(compared):
            check_attention(configs[name], {teacher for _, teacher in pairs})


def check_alike(folder: RunFolder, models: Sequence[str], *, where: str) -> None:
    """Refuse to combine weights of models whose configurations show them to differ in shape."""
    shape = ("model_type", "hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
    seen = {}
    for name in models:
        config = load_config(folder.model(folder.root(name)))
        seen[name] = {key: getattr(config, key, None) for key in shape}
    first = next(iter(seen))
    for name, found in seen.items():
        apart = [key for key in shape if found[key] != seen[first][key]]
        if apart:
            raise InputError(
                "models of different shape cannot be made one",
                where=where,
                expected=", ".join(f"{key} {seen[first][key]}" for key in apart)
                + f" as in {first}",
                found=", ".join(f"{key} {found[key]}" for key in apart) + f" in {name}",
                do="name models that were trained from one model",
            )


def check_tasks(folder: RunFolder, tokenizers: ChatTokenizers) -> None:
    """Refuse tasks that would fail after everything has been trained."""
    evaluation = folder.recipe.evaluate
    if evaluation is None:
        return
    for name in evaluation.models.values():
        if name not in folder.recipe.stages:
            load_config(folder.model(name))
    for name, task in evaluation.tasks.items():
        if task.lm_eval is not None:
            check_harness(task.lm_eval, where=f"evaluate.tasks.{name}")
        if task.source is not None:
            _check_questions(task, read_split(folder.source(task.source), task.split))
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
        exam(benchmark)
        if not folder.replies(name).exists():
            benchmark.judge.key(where=f"evaluate.benchmarks.{name}.judge")


def _check_questions(task: Task, conversations: Sequence[Conversation]) -> None:
    check_group(conversations, task.by)
    if task.metric == "choice":
        for conversation in conversations[: task.limit]:
            candidates(conversation, task.options)
    elif task.metric not in UNGENERATED:
        check_rows(task, conversations[: task.limit])
