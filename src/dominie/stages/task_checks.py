"""Checks tasks and judged benchmarks, which would otherwise fail after all training."""

from __future__ import annotations

from collections.abc import Callable
from weakref import WeakKeyDictionary

from dominie.data.conversations import Conversation
from dominie.data.sources import Split, read_split
from dominie.data.tokenization import prompt_ids
from dominie.evaluation.lm_eval import check_harness
from dominie.evaluation.metrics import METRICS, check_rows
from dominie.evaluation.task import candidates, check_group, check_rendering
from dominie.models.matching import check_same_tokens
from dominie.recipe import Task
from dominie.stages.run_folder import ChatTokenizers, RunFolder

#: Conversations of a split that stay in memory while stages train.
_MOST_KEPT = 10_000
_KEPT: WeakKeyDictionary[RunFolder, dict[tuple[str, Split], list[Conversation]]] = (
    WeakKeyDictionary()
)


def check_tasks(
    folder: RunFolder, tokenizers: ChatTokenizers, exists: Callable[[str], bool]
) -> list[str]:
    """Refuse tasks that would fail after all training; questions of a source, only if it exists.

    Returns:
        What a person should know of the files of benchmarks.
    """
    evaluation = folder.recipe.evaluate
    if evaluation is None:
        return []
    notes: list[str] = []
    for name in evaluation.models.values():
        if name not in folder.recipe.stages:
            folder.info(name)
    for name, task in evaluation.tasks.items():
        if task.lm_eval is not None:
            check_harness(task.lm_eval, where=f"evaluate.tasks.{name}")
        if task.source is not None and exists(task.source):
            notes += check_task(folder, task, tokenizers)
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
    for name in folder.recipe.served.keys() & {*evaluation.models.values()}:
        folder.recipe.served[name].key(where=f"models.{name}")
    for name, benchmark in evaluation.benchmarks.items():
        loaded = benchmark.load()
        notes += [f"{name}: {note}" for note in loaded.notes]
        for model in set(evaluation.models.values()) - folder.recipe.served.keys():
            where = f"evaluate.benchmarks.{name}, model {model}"
            for dialogue in {len(each.turns): each for each in loaded.dialogues}.values():
                messages = dialogue.next_turn(["a"] * (len(dialogue.turns) - 1))
                prompt_ids(tokenizers.of(model), messages, where=where)
        if not folder.replies(name).exists():
            benchmark.judge.key(where=f"evaluate.benchmarks.{name}.judge")
    return notes


def task_rows(folder: RunFolder, name: str, split: Split) -> list[Conversation]:
    """The conversations of a split; for checks and scores of tasks a short one is read once.

    Raises:
        InputError: as `read_split` does.
    """
    kept = _KEPT.setdefault(folder, {})
    found = kept.get((name, split))
    if found is None:
        found = read_split(folder.source(name), split)
        if len(found) <= _MOST_KEPT and name in folder.recipe.data:  # what a stage makes may change
            kept[name, split] = found
    return found


def check_task(folder: RunFolder, task: Task, tokenizers: ChatTokenizers) -> list[str]:
    """Refuse a task whose rows have no right answer, or that a chat template fails on.

    Returns:
        What the template of an evaluated model leaves out; that of the stages is told with sources.
    """
    assert task.source is not None, "a task of lm_eval brings its own questions"
    conversations = task_rows(folder, task.source, task.split)
    check_group(conversations, task.by)
    if task.metric == "choice":
        for conversation in conversations[: task.limit]:
            candidates(conversation, task.options)
    elif METRICS[task.metric].score is not None:
        check_rows(task, conversations[: task.limit])
    assert folder.recipe.evaluate is not None, "it has the task"
    models = {m: tokenizers.of(m) for m in folder.recipe.evaluate.models.values()}
    made = [name for name, stage in folder.recipe.stages.items() if stage.makes == "model"]
    told = {str(tokenizers.of(name).chat_template) for name in made}
    return [
        f"{task.source}, asked of {model}: its chat template leaves out {each.what} "
        f"(the first: {each.first})"
        for model, lost in check_rendering(models, conversations[: task.limit]).items()
        for each in lost
        if str(models[model].chat_template) not in told
    ]
