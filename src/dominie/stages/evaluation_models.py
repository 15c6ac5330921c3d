"""Loads the models of an evaluation, one model and one teacher at a time, as rarely as it can."""

from __future__ import annotations

import functools
import gc
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from dominie.core.display import Display
from dominie.core.distributed import init_distributed, rank, world_size
from dominie.core.errors import RunError
from dominie.core.hardware import trim_memory
from dominie.core.task_result import LIKENESS
from dominie.data.tokenization import Encoded
from dominie.evaluation.metrics import METRICS
from dominie.evaluation.task import Question
from dominie.generation.calls import Ask, Calls
from dominie.generation.generator import (
    FILTERED,
    EndpointGenerator,
    Generation,
    GenerationRequest,
    Sampling,
    generate_all,
)
from dominie.generation.reply_log import ReplyLog
from dominie.models.loading import load_frozen
from dominie.recipe import Evaluation, Task
from dominie.stages.fingerprint import digest, model_fingerprint
from dominie.stages.run_folder import ChatTokenizers, RunFolder
from dominie.stages.server_scores import ServerScorer


@dataclass(frozen=True)
class Step:
    """Tasks that are scored together, since they ask a model for the same answers.

    Attributes:
        model: as `results.json` names it.
        tasks: by name.
        teacher: that has to be in memory beside the model.
    """

    model: str
    tasks: tuple[str, ...]
    teacher: str | None


def plan_steps(evaluation: Evaluation, pending: Mapping[str, Sequence[str]]) -> list[Step]:
    """Order tasks so that few models are loaded when only one and one teacher fit in memory.

    Of each model, tasks without a teacher come first, then those whose teacher is in memory.

    Args:
        evaluation: of the recipe.
        pending: names of the tasks to score, by model.
    """
    steps: list[Step] = []
    held: str | None = None
    for name, tasks in pending.items():
        together: dict[tuple[Any, ...], list[str]] = {}
        for task in tasks:
            together.setdefault(_answers_key(task, evaluation.tasks[task]), []).append(task)
        mine = [Step(name, tuple(t), _teacher(evaluation.tasks[t[0]])) for t in together.values()]
        order = [None, evaluation.models[name], held, *(step.teacher for step in mine)]
        mine.sort(key=lambda step: order.index(step.teacher))
        held = next((step.teacher for step in reversed(mine) if step.teacher), held)
        steps += mine
    return steps


def _teacher(task: Task) -> str | None:
    return task.teacher if task.metric in LIKENESS else None


def _answers_key(name: str, task: Task) -> tuple[Any, ...]:
    """Equal for tasks that generate the same answers; any other task is alone."""
    if METRICS[task.metric].score is None:
        return (name,)
    return task.source, task.split, task.limit, task.max_new_tokens


class ServedAnswers:
    """A model behind a server, as tasks ask it: for answers, and for the likelihood of options.

    Args:
        folder: of the run; replies are kept in it, and none is paid for twice.
        name: of the model in the recipe.
        show: shows a line.
    """

    def __init__(self, folder: RunFolder, name: str, show: Callable[[str], None]) -> None:
        self.served, self.where, self._show = folder.recipe.served[name], f"models.{name}", show
        label = re.sub(r"[^A-Za-z0-9._-]+", "-", name)
        self._path = folder.path / "evaluation" / f"{label}.{rank()}.replies.jsonl"
        self._tokens = self.served.tokenizer and len(folder.info(name).tokenizer())

    def outputs(self, questions: Sequence[Question], sampling: Sampling) -> list[Generation]:
        """Answers to questions, by chat completions.

        Raises:
            InputError, RunError: a question has none.
        """
        calls = Calls(self.served, ReplyLog(self._path), where=self.where, show=self._show)
        requests = [GenerationRequest(messages=q.asked, sampling=sampling) for q in questions]
        found = generate_all(EndpointGenerator(calls), requests)
        failed = [each.reason for each in found if each.stop_reason == "unanswered"]
        if [reason for reason in failed if reason != FILTERED]:
            raise RunError(
                "questions of a task were not answered",
                where=self.where,
                found=f"{len(failed)} of {len(found)}: {failed[0]}",
                do="run again, which asks the missing ones alone",
            )
        return found

    def log_likelihoods(self, questions: Sequence[Sequence[Encoded]]) -> list[list[list[float]]]:
        """[options, 2] of each question: an option's log-likelihood in nats, and its tokens.

        Raises:
            InputError: the server returns no log-probabilities of prompts.
        """
        rows = [row for options in questions for row in options]
        scorer = ServerScorer(
            self.served,
            where=self.where,
            purpose="a task of options",
            kept="what was scored of other tasks is kept",
            k=1,
            longest=max(len(row.input_ids) for row in rows),
            vocabulary=self._tokens or 0,
            log=self._path.with_suffix(".calls.jsonl"),
            show=self._show,
        )
        calls = scorer.calls()

        async def work(row: Encoded, ask: Ask) -> list[float]:
            places = [at for at, flag in enumerate(row.supervised) if flag and at]
            scores = await scorer.ask(list(row.input_ids), places, ask, calls)
            return [float(scores.actual.sum()), float(len(places))]

        found = iter(calls.run(rows, work))
        return [[next(found) for _ in options] for options in questions]


class EvaluationModels:
    """The models that a recipe names, each loaded when it is asked for.

    Args:
        fingerprints: of the models that stages made.
        display: where a borrowed chat template is mentioned.

    Attributes:
        tokenizers: of the models, with chat templates.
    """

    def __init__(
        self, folder: RunFolder, fingerprints: Mapping[str, str], display: Display
    ) -> None:
        self.folder, self._trained, self.display = folder, fingerprints, display
        self.tokenizers = ChatTokenizers(folder, display)
        self._loaded: dict[str, Any] = {}
        self._weights = functools.cache(lambda name: model_fingerprint(folder.spec(name)))

    def load(self, name: str, *, beside: str | None = None) -> Any:
        """Return a model in evaluation mode. All others are freed first, except one.

        Args:
            name: of a stage or model of the recipe.
            beside: the model that stays in memory, if it is there.
        """
        if name not in self._loaded:
            self.free(keep=beside)
            if name in self.folder.recipe.served:
                self._loaded[name] = ServedAnswers(self.folder, name, self.display.line)
            else:
                self._loaded[name] = load_frozen(self.folder.model(name), device=self._device)
        return self._loaded[name]

    def free(self, *, keep: str | None = None) -> None:
        """Give the memory of all models but one back to the system."""
        for name in self._loaded.keys() - {keep}:
            del self._loaded[name]
        gc.collect()  # modules and their hooks refer to each other
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        trim_memory()

    def weights_fingerprint(self, name: str) -> str:
        """Return what distinguishes a model's weights."""
        if (served := self.folder.recipe.served.get(name)) is not None:
            return digest("served", served.model, served.request)
        return self._trained.get(name) or self._weights(name)

    @property
    def _device(self) -> torch.device:
        if world_size() > 1:
            return torch.device(init_distributed().device)
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
