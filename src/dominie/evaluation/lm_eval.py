"""Tasks of EleutherAI's lm-evaluation-harness, run on the loaded model."""

from __future__ import annotations

import hashlib
import importlib.util
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dominie.core.errors import InputError, RunError
from dominie.data.chat_template import ChatTemplate
from dominie.evaluation.score_items import ScoredTask, score_items
from dominie.evaluation.task import Harness
from dominie.generation.local import plain_decoding
from dominie.generation.thoughts import is_end


def check_harness(settings: Harness, *, where: str) -> None:
    """Refuse tasks that could not run, before anything is trained.

    Raises:
        InputError: lm-eval is not installed, or a task or the folder of definitions is not known.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise InputError(
            "metric lm_eval needs a package that is not installed",
            where=where,
            expected="lm-eval",
            do="pip install 'dominie[lm-eval]'",
        )
    if settings.include is not None and not Path(settings.include).is_dir():
        raise InputError(
            "no such folder of task definitions",
            where=f"{where}.lm_eval.include",
            found=settings.include,
        )
    manager = _manager(settings)
    for task in settings.tasks:
        if task not in manager.all_tasks:
            raise InputError(
                f"lm-eval knows no task {task!r}",
                where=f"{where}.lm_eval.tasks",
                do="list them with `lm-eval ls tasks`, or set include to a folder of definitions",
            )
        for name, filters in _defined_filters(manager, task).items():
            _check_filter(settings, name, filters, where=f"{where}.lm_eval.filter")


def definitions_digest(settings: Harness) -> str:
    """Hash the files in the folder of definitions: a changed task is another task."""
    total = hashlib.sha256()
    if settings.include is not None:
        for path in sorted(path for path in Path(settings.include).rglob("*") if path.is_file()):
            total.update(path.name.encode())
            total.update(path.read_bytes())
    return total.hexdigest()


def harness_score(
    model: Any,
    tokenizer: Any,
    settings: Harness,
    *,
    batch: int = 64,
    limit: int | None = None,
    keep_thoughts: bool = False,
) -> ScoredTask:
    """Score by the mean of one of the harness's figures over the documents of its tasks, by task.

    Args:
        model: a causal language model in evaluation mode.
        batch: requests per forward pass.
        limit: documents of each task; None is all.
        keep_thoughts: whether answers are read with what comes before the end of thoughts; left
            out are thoughts whose end is a token of the model, which is as far as lm-eval can.

    Raises:
        InputError: a task has no such figure for each document, or several filters of which none
            is named, or its own value of the figure is no mean or better when lower.
        RunError: the harness failed, perhaps because there is no network.
    """
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    ends = [] if keep_thoughts else [t for t in tokenizer.get_added_vocab() if is_end(t)]
    adapter = HFLM(
        pretrained=model,
        tokenizer=tokenizer,
        batch_size=batch,
        device=str(model.device),
        think_end_token=min(ends, default=None),
    )
    render = adapter.apply_chat_template

    def tried(messages: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        ChatTemplate(tokenizer).try_rendering(messages, None, add_generation_prompt, None)
        return str(render(messages, add_generation_prompt))

    adapter.apply_chat_template = tried
    try:
        with plain_decoding(model):
            found = simple_evaluate(
                model=adapter,
                tasks=list(settings.tasks),
                num_fewshot=settings.few_shot,
                limit=limit,
                apply_chat_template=settings.chat_template,
                task_manager=_manager(settings),
                bootstrap_iters=0,
                log_samples=True,
            )
    except Exception as error:  # the harness and its loaders raise errors of any type
        raise RunError(
            "lm-eval failed",
            where=", ".join(settings.tasks),
            found=f"{type(error).__name__}: {error}"[:300],
            do="run with --debug; data sets that are not in the cache need a network",
        ) from error
    assert found is not None, "every rank is given the result"
    samples = [
        sample
        for task, documents in found["samples"].items()
        for sample in _samples(task, documents, found, settings)
    ]
    return score_items(
        [(sample["score"], 1.0) for sample in samples],
        "ratio",
        questions=[f"{sample['group']} {sample.pop('document')}" for sample in samples],
        groups=[sample["group"] for sample in samples],
        samples=samples,
    )


def _sample(task: str, document: Mapping[str, Any], figure: str) -> dict[str, Any]:
    value = document.get(figure)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= 1:
        numbers = [key for key, value in document.items() if isinstance(value, (int, float))]
        raise InputError(
            f"task {task} has no figure {figure!r} from 0 to 1 for each document",
            where="lm_eval.figure",
            expected=f"one of {', '.join(sorted(set(numbers) - {'doc_id'}))}",
        )
    asked = document["arguments"]
    first = next(iter(asked.values())) if isinstance(asked, Mapping) else asked[0]
    prompt = next(iter(first.values())) if isinstance(first, Mapping) else first[0]
    return {
        "prompt": str(prompt),
        "target": str(document["target"]),
        "output": str(document["filtered_resps"]),
        "correct": float(value) >= 1.0,
        "score": float(value),
        "group": task,
        "document": document["doc_id"],
    }


def _samples(
    task: str, documents: Sequence[Mapping[str, Any]], found: Mapping[str, Any], settings: Harness
) -> list[dict[str, Any]]:
    """Return a task's documents as one filter reads their answers, once each.

    The harness lists every document once for each filter.
    """
    figure, filters = settings.figure, list(dict.fromkeys(d["filter"] for d in documents))
    _check_filter(settings, task, filters, where="lm_eval.filter")
    chosen = settings.filter or filters[0]
    samples = [_sample(task, d, figure) for d in documents if d["filter"] == chosen]
    own = found["results"][task].get(f"{figure},{chosen}")
    mean = sum(sample["score"] for sample in samples) / len(samples)
    if not isinstance(own, (int, float)) or abs(own - mean) > 1e-6:
        raise InputError(
            f"the figure {figure!r} of task {task} is no mean over its documents",
            where="lm_eval.figure",
            expected=f"{mean:.6g}, the mean",
            found=f"{own}, as lm-eval computes it",
            do="choose another figure of the task",
        )
    if not found.get("higher_is_better", {}).get(task, {}).get(figure, True):
        raise InputError(
            f"the figure {figure!r} of task {task} is better when it is lower",
            where="lm_eval.figure",
            expected="a figure that is better when it is higher",
        )
    return samples


def _check_filter(settings: Harness, task: str, filters: Sequence[str], *, where: str) -> None:
    """Refuse a filter that a task does not have, and to choose between several."""
    wanted = settings.filter
    if wanted in filters or (wanted is None and len(filters) < 2):
        return
    raise InputError(
        f"task {task} has several filters, each with a figure of its own"
        if wanted is None
        else f"task {task} has no filter {wanted!r}",
        where=where,
        expected=f"one of {', '.join(filters)}",
        do="set filter; tasks of other filters go into a task of their own",
    )


def _defined_filters(manager: Any, name: str) -> dict[str, list[str]]:
    """Return the filters of a task, or of the tasks of a group, as far as definitions tell."""
    config = getattr(manager.task_index.get(name), "cfg", None)
    if not isinstance(config, Mapping):
        return {}
    if isinstance(parts := config.get("task"), list):
        named = [part.get("task") if isinstance(part, Mapping) else part for part in parts]
        found = [_defined_filters(manager, part) for part in named if isinstance(part, str)]
        return {task: filters for part in found for task, filters in part.items()}
    listed = config.get("filter_list")
    names = [str(each.get("name")) for each in listed] if isinstance(listed, list) else []
    return {name: names} if names else {}


def _manager(settings: Harness) -> Any:
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=settings.include)
