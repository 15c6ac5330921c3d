"""Scores every model of a recipe on every task; keeps results that still hold."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from dominie.core.display import Display
from dominie.core.distributed import broadcast_from_main, destroy_distributed, is_main_process
from dominie.core.errors import InputError
from dominie.core.io import file_manifest, write_atomic, write_checksummed
from dominie.core.results_file import (
    RESULTS,
    SEAL,
    kept_result,
    with_others,
    write_results,
)
from dominie.core.run_reader import read_object
from dominie.core.task_result import TaskResult, in_nats
from dominie.data.conversations import Conversation
from dominie.data.sources import conversation_digest
from dominie.evaluation.likelihood import choice
from dominie.evaluation.lm_eval import definitions_digest, harness_score
from dominie.evaluation.score_items import Items, ScoredTask, compare_models
from dominie.evaluation.scoring import LIKENESSES, generate_outputs, score_outputs
from dominie.evaluation.task import Question, questions
from dominie.generation.local import LocalGenerator
from dominie.models.head import check_head, text_config
from dominie.models.info import info_of
from dominie.models.matching import check_context, check_same_tokens, check_vocabulary
from dominie.recipe import Evaluation, Task
from dominie.stages.evaluation_models import EvaluationModels, ServedAnswers, Step, plan_steps
from dominie.stages.fingerprint import digest
from dominie.stages.judged import JudgedScores
from dominie.stages.run_folder import RunFolder
from dominie.stages.task_checks import task_rows

#: Part of every result's fingerprint: raised when the same task would come to another result.
_FORMAT = 3


def evaluate(
    folder: RunFolder,
    fingerprints: Mapping[str, str],
    display: Display,
    on_written: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """Score what has not been scored yet, and write `results.json`.

    The ranks of a run share the questions of each task. The main process alone runs lm-eval, calls
    judges and writes files; the others return when all models are scored.

    Args:
        folder: of the run.
        fingerprints: of the models that stages made.
        on_written: called on the main process when the results are written, and before the error
            that a model without a figure ends in.

    Returns:
        `{model: {task: {score, stderr, n, …}}}`; empty on all processes but the main one.
    """
    evaluation, main = folder.recipe.evaluate, is_main_process()
    if evaluation is None:
        destroy_distributed()
        if main:
            for name in (RESULTS, SEAL):
                (folder.path / name).unlink(missing_ok=True)  # an earlier recipe's
            on_written()
        return {}
    _check_trained(folder, evaluation)
    evaluator = Evaluator(folder, evaluation, fingerprints, display)
    judged = JudgedScores(folder, evaluation, evaluator.generator, display) if main else None
    results = {}
    for name in evaluation.models:
        results[name] = evaluator.scores(name) | (judged.scores(name) if judged else {})
    evaluator.models.free()
    destroy_distributed()
    if judged is None:
        return {}
    results |= {name: judged.scores(name) for name in evaluation.endpoints}
    seal = evaluator.seal()
    if folder.described.evaluate is not None:
        results = with_others(folder.path, folder.described.evaluate.scored, results, seal)
    baseline = evaluation.baseline or next(iter(results))
    differences = _differences(folder.path / "evaluation", results)
    write_results(folder.path, results, baseline, differences, seal)
    if any(results.values()) or folder.recipe.stages:
        on_written()
    judged.check_headlines()
    return results


def _check_trained(folder: RunFolder, evaluation: Evaluation) -> None:
    teachers = [task.teacher for task in evaluation.tasks.values() if task.teacher]
    for name in (*evaluation.models.values(), *teachers):
        if name in folder.recipe.stages and not Path(folder.spec(name).path).is_dir():
            raise InputError(
                f"stage {name} has not been trained",
                where=folder.spec(name).path,
                do="run `dominie run` first",
            )


class Evaluator:
    """Scores the models of a recipe on its tasks."""

    def __init__(
        self,
        folder: RunFolder,
        evaluation: Evaluation,
        fingerprints: Mapping[str, str],
        display: Display,
    ) -> None:
        self.folder, self.evaluation, self.display = folder, evaluation, display
        self.models = EvaluationModels(folder, fingerprints, display)
        self._conversations = functools.cache(functools.partial(task_rows, folder))
        self._questions: dict[tuple[Any, ...], list[Question]] = {}
        self.fingerprints = fingerprints
        self._kept = broadcast_from_main(self._read_kept)
        pending = {
            name: [task for task in evaluation.tasks if task not in kept]
            for name, kept in self._kept.items()
        }
        self._steps = plan_steps(evaluation, pending)

    def generator(self, name: str) -> LocalGenerator:
        """Return a generator of answers by one of the models, which is loaded when it is needed."""
        return LocalGenerator(
            lambda: (self._load(name), self.models.tokenizers.of(name)),
            [self.models.weights_fingerprint(name), self.models.tokenizers.fingerprint(name)],
            batch=self.evaluation.batch,
        )

    def scores(self, name: str) -> dict[str, Any]:
        """Score one model on all tasks; results that still hold come from their files."""
        found, fresh = dict(self._kept[name]), False
        while self._steps and self._steps[0].model == name:
            for task, scored in self._score(self._steps[0]).items():
                found[task], fresh = self._write(name, task, scored), True
            del self._steps[0]
        found = {task: found[task] for task in self.evaluation.tasks if task in found}
        if found:
            text = ", ".join(f"{task} {_in_percent(result)}" for task, result in found.items())
            self.display.done(name, text if fresh else f"already scored ({text})")
        return found

    def _score(self, step: Step) -> dict[str, ScoredTask]:
        """Score the tasks of a step; on other processes than the main one, none of lm-eval's."""
        tasks = {name: self.evaluation.tasks[name] for name in step.tasks}
        first, task = next(iter(tasks.items()))
        name, title = self.evaluation.models[step.model], f"{step.model} on {first}"
        batch = self.evaluation.batch

        def track(items: Any, total: int) -> Any:
            return self.display.track(items, title, total)

        tokenizer = self.models.tokenizers.of(name)
        if task.lm_eval is not None:
            if not is_main_process():
                return {}
            scored = harness_score(
                self._load(name),
                tokenizer,
                task.lm_eval,
                batch=batch,
                limit=task.limit,
                keep_thoughts=task.keep_thoughts,
            )
            return {first: scored}
        asked, model = self._asked(task, name), self._load(name)
        _check_questions(model, asked, where=title)
        if task.metric == "choice":
            if name not in self.folder.recipe.served:
                check_head(model, where=name)
            scored = choice(
                model,
                tokenizer,
                asked,
                options=task.options,
                likelihood=task.likelihood,
                batch=batch,
                track=track,
            )
            return {first: scored}
        if step.teacher is not None:
            where = f"{title}, teacher {step.teacher}"
            check_same_tokens(tokenizer, self.models.tokenizers.of(step.teacher), where=where)
            teacher = self.models.load(step.teacher, beside=name)
            _check_questions(teacher, asked, where=where)
            check_head(model, where=name)
            check_head(teacher, where=step.teacher)
            return {first: LIKENESSES[task.metric](model, teacher, asked, batch=batch, track=track)}
        outputs = generate_outputs(
            model, tokenizer, asked, max_new_tokens=task.max_new_tokens, batch=batch, track=track
        )
        return {n: score_outputs(self._asked(t, name), outputs, t) for n, t in tasks.items()}

    def _load(self, name: str) -> Any:
        """Return a model; the teacher that is needed next stays in memory."""
        teacher = next((step.teacher for step in self._steps if step.teacher), None)
        return self.models.load(name, beside=teacher)

    def _asked(self, task: Task, name: str) -> list[Question]:
        """Return the task's questions, encoded once for all models of one tokenizer."""
        tokens = self.models.tokenizers.fingerprint(name)
        key = (task.source, task.split, task.limit, task.by, tokens)
        if key not in self._questions:
            tokenizer = self.models.tokenizers.of(name)
            self._questions[key] = questions(tokenizer, self._rows(task), by=task.by)
        return self._questions[key]

    def _rows(self, task: Task) -> list[Conversation]:
        """Return the rows a task asks, none if it brings its own questions."""
        if task.source is None:
            return []
        return self._conversations(task.source, task.split)[: task.limit]

    def _write(self, model: str, task: str, scored: ScoredTask) -> dict[str, Any]:
        """Keep a result with its samples in `evaluation/`; return what `results.json` has of it."""
        settings = self.evaluation.tasks[task]
        result = dataclasses.replace(
            scored.result, metric=settings.metric, measure=settings.measure
        ).as_dict()
        if is_main_process():
            path = self._path(model, task)
            path.parent.mkdir(parents=True, exist_ok=True)
            lines = "".join(json.dumps(sample) + "\n" for sample in scored.samples)
            write_atomic(path.with_suffix(".jsonl"), lines)
            record = {
                "fingerprint": self._fingerprint(model, settings),
                "result": result,
                "items": scored.items.as_dict(),
                "samples": file_manifest(path.parent, [path.with_suffix(".jsonl")]),
            }
            write_checksummed(path, record, indent=None)
        return result

    def _read_kept(self) -> dict[str, dict[str, dict[str, Any]]]:
        """Return the results of earlier runs that still hold, by model and task."""
        kept: dict[str, dict[str, dict[str, Any]]] = {}
        for model in self.evaluation.models:
            kept[model] = {}
            for name, task in self.evaluation.tasks.items():
                fingerprint = self._fingerprint(model, task)
                if (result := kept_result(self._path(model, name), fingerprint)) is not None:
                    kept[model][name] = result
        return kept

    def seal(self) -> dict[str, Any]:
        """Return what results are of: stages behind models and tasks, and what a task asks."""
        evaluation, made = self.evaluation, self.fingerprints

        def stages(*names: str | None) -> dict[str, str]:
            return {name: made[name] for name in names if name is not None and name in made}

        tasks = {
            name: {"asks": self._asks(task), "stages": stages(task.teacher, task.source)}
            for name, task in evaluation.tasks.items()
        }
        for name, benchmark in evaluation.benchmarks.items():
            tasks[name] = {"asks": digest(dataclasses.asdict(benchmark)), "stages": {}}
        of = {n: {"model": m, "stages": stages(m)} for n, m in evaluation.scored.items()}
        sources = {name: task.source for name, task in evaluation.tasks.items() if task.source}
        return {"models": of, "tasks": tasks, "sources": sources}

    def _asks(self, task: Task) -> str:
        return digest(
            dataclasses.asdict(task),
            task.lm_eval and definitions_digest(task.lm_eval),
            [(conversation_digest(c).hex(), c.fields) for c in self._rows(task)],
        )

    def _path(self, model: str, task: str) -> Path:
        return self.folder.path / "evaluation" / model / f"{task}.json"

    def _fingerprint(self, model: str, task: Task) -> str:
        name = self.evaluation.models[model]
        return digest(
            _FORMAT,
            dataclasses.asdict(task),
            task.lm_eval and definitions_digest(task.lm_eval),
            self.models.weights_fingerprint(name),
            self.models.tokenizers.fingerprint(name),
            task.teacher and self.models.weights_fingerprint(task.teacher),
            [(conversation_digest(c).hex(), c.fields) for c in self._rows(task)],
        )


def _check_questions(model: Any, asked: Sequence[Question], *, where: str) -> None:
    """Refuse questions that a model cannot place or has no embedding for."""
    if isinstance(model, ServedAnswers):
        return  # the server says so itself
    info, ids = info_of(text_config(model)), [question.encoded.input_ids for question in asked]
    check_context(
        info, max(map(len, ids)), where=where, do="take the longest rows out of the split"
    )
    check_vocabulary(info, max(map(max, ids)), where=where)


def _in_percent(record: Mapping[str, Any]) -> str:
    """Format a score with its interval, and how many outputs are no whole answers."""
    result = TaskResult.from_dict(record)
    assert result is not None, "it has a score"
    if (kl := result.kl) is not None:
        return in_nats(kl)
    low, high = (100 * end for end in result.ends or (result.score, result.score))
    text = f"{100 * result.score:.1f} % ({low:.1f} to {high:.1f})"
    words = {"invalid": "invalid", "cut": "cut off", "empty": "empty"}
    rates = {word: result.extras.get(name) for name, word in words.items()}
    amiss = [f"{100 * rate:.1f} % of outputs {word}" for word, rate in rates.items() if rate]
    return ", ".join([text, *amiss])


def _differences(folder: Path, results: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Return how far models differ on the same questions, task by task."""
    tasks: dict[str, dict[str, Items]] = {}
    for model, scores in results.items():
        for task in scores:
            try:
                items = Items(**read_object(folder / model / f"{task}.json")["items"])
            except (InputError, KeyError, TypeError):
                continue  # a result of an earlier version, which did not keep them
            tasks.setdefault(task, {})[model] = items
    return {task: compare_models(items) for task, items in tasks.items()}
