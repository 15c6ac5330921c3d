"""Scores every model of a recipe on every task, and keeps what is still true."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from dominie.core.display import Display
from dominie.core.errors import InputError
from dominie.core.io import (
    file_manifest,
    manifest_error,
    read_checksummed,
    write_atomic,
    write_checksummed,
    write_json,
)
from dominie.data.conversations import Conversation
from dominie.data.sources import conversation_digest, read_split
from dominie.evaluation.generative_task import generate_outputs, score_outputs
from dominie.evaluation.likelihood import agreement, choice
from dominie.evaluation.lm_eval import definitions_digest, harness_score
from dominie.evaluation.results import Items, ScoredTask, compare_models
from dominie.evaluation.task import Question, questions
from dominie.models.head import check_head, text_config
from dominie.models.info import ModelInfo, info_of
from dominie.models.loading import load_frozen
from dominie.models.tokenizer_compat import check_context, check_same_tokens, check_vocabulary
from dominie.recipe import Evaluation, Task
from dominie.stages.fingerprint import digest, model_fingerprint
from dominie.stages.judged import JudgedScores, LocalModels
from dominie.stages.run_folder import ChatTokenizers, RunFolder

#: Part of every result's fingerprint: raised when the same task would come to another result.
_FORMAT = 2


def evaluate(
    folder: RunFolder, fingerprints: Mapping[str, str], display: Display
) -> dict[str, Any]:
    """Score what has not been scored yet, and write `results.json`.

    Args:
        folder: of the run.
        fingerprints: of the models that stages made.
        display: shows progress.

    Returns:
        `{model: {task: {score, stderr, n, …}}}`.
    """
    evaluation = folder.recipe.evaluate
    if evaluation is None:
        (folder.path / "results.json").unlink(missing_ok=True)  # an earlier recipe's
        return {}
    _check_trained(folder, evaluation)
    examiner = Evaluator(folder, evaluation, fingerprints, display)
    judged = JudgedScores(folder, evaluation, examiner.models, display)
    results = {name: examiner.scores(name) | judged.scores(name) for name in evaluation.models}
    results |= {name: judged.scores(name) for name in evaluation.endpoints}
    baseline = evaluation.baseline or next(iter(results))
    _compare(folder.path / "evaluation", results, baseline)
    write_json(folder.path / "results.json", results)
    judged.check_headlines()
    return results


def _compare(folder: Path, results: Mapping[str, Mapping[str, Any]], baseline: str) -> None:
    """Write how far models differ on the same questions, task by task."""
    tasks: dict[str, dict[str, Items]] = {}
    for model, scores in results.items():
        for task in scores:
            if (items := _kept_items(folder / model / f"{task}.json")) is not None:
                tasks.setdefault(task, {})[model] = items
    differences = {task: compare_models(items) for task, items in tasks.items()}
    write_json(folder / "comparisons.json", {"baseline": baseline, "differences": differences})


def _check_trained(folder: RunFolder, evaluation: Evaluation) -> None:
    teachers = [task.teacher for task in evaluation.tasks.values() if task.teacher]
    for name in (*evaluation.models.values(), *teachers):
        if name in folder.recipe.stages and not Path(folder.model(name).path).is_dir():
            raise InputError(
                f"stage {name} has not been trained",
                where=folder.model(name).path,
                do="run `dominie run` first",
            )


class Evaluator:
    """Holds one model and one teacher at a time while tasks are worked through."""

    def __init__(
        self,
        folder: RunFolder,
        evaluation: Evaluation,
        fingerprints: Mapping[str, str],
        display: Display,
    ) -> None:
        self.folder, self.evaluation, self.display = folder, evaluation, display
        self._fingerprints = dict(fingerprints)
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._load = functools.lru_cache(maxsize=2)(self._loaded)
        self._conversations = functools.cache(self._read)
        self._tokenizers = ChatTokenizers(folder, display)
        self._asked: dict[tuple[Any, ...], list[Question]] = {}
        self._outputs: dict[tuple[Any, ...], list[str]] = {}

    @property
    def models(self) -> LocalModels:
        """The same models, for benchmarks that are judged."""

        def fingerprint(name: str) -> list[str]:
            return [self._model_fingerprint(name), self._tokenizers.fingerprint(name)]

        return LocalModels(self._load, fingerprint)

    def scores(self, name: str) -> dict[str, Any]:
        """The scores of one model on all tasks, from file where nothing has changed."""
        model, scores, fresh = self.evaluation.models[name], {}, []
        for task_name, task in self.evaluation.tasks.items():
            kept = self.folder.path / "evaluation" / name / f"{task_name}.json"
            fingerprint = self._fingerprint(model, task)
            result = _kept_result(kept, fingerprint)
            if result is None:
                score = self._score(f"{name} on {task_name}", model, task)
                result = dataclasses.replace(
                    score.result, metric=task.metric, measure=task.measure
                ).as_dict()
                kept.parent.mkdir(parents=True, exist_ok=True)
                lines = "".join(json.dumps(sample) + "\n" for sample in score.samples)
                write_atomic(kept.with_suffix(".jsonl"), lines)
                items = score.items.as_dict()
                record = {"fingerprint": fingerprint, "result": result, "items": items}
                record["samples"] = file_manifest(kept.parent, [kept.with_suffix(".jsonl")])
                write_checksummed(kept, record, indent=None)
                fresh.append(task_name)
            scores[task_name] = result
        told = ", ".join(f"{task} {_told(scores[task])}" for task in scores)
        if not scores:
            return scores
        self.display.done(name, told if fresh else f"already scored ({told})")
        return scores

    def _score(self, title: str, name: str, task: Task) -> ScoredTask:
        model, tokenizer = self._load(name)
        batch, track = self.evaluation.batch, functools.partial(self._track, title)
        if task.lm_eval is not None:
            return harness_score(model, tokenizer, task.lm_eval, batch=batch, limit=task.limit)
        asked = self._questions(task, name, tokenizer)
        _check_questions(info_of(text_config(model)), asked, where=title)
        if task.metric == "choice":
            check_head(model, where=name)
            return choice(
                model,
                tokenizer,
                asked,
                options=task.options,
                likelihood=task.likelihood,
                batch=batch,
                track=track,
            )
        if task.metric != "agreement":
            key = (name, task.source, task.split, task.limit, task.max_new_tokens)
            if key not in self._outputs:  # tasks that ask one model the same are answered once
                self._outputs = {k: v for k, v in self._outputs.items() if k[0] == name}
                self._outputs[key] = generate_outputs(
                    model,
                    tokenizer,
                    asked,
                    max_new_tokens=task.max_new_tokens,
                    batch=batch,
                    track=track,
                )
            return score_outputs(asked, self._outputs[key], task)
        assert task.teacher is not None, "checked by Task"
        teacher, theirs = self._load(task.teacher)
        check_same_tokens(tokenizer, theirs, where=f"{title}, teacher {task.teacher}")
        _check_questions(
            info_of(text_config(teacher)), asked, where=f"{title}, teacher {task.teacher}"
        )
        check_head(model, where=name)
        check_head(teacher, where=task.teacher)
        return agreement(model, teacher, asked, batch=batch, track=track)

    def _questions(self, task: Task, name: str, tokenizer: Any) -> list[Question]:
        """The task's questions, encoded once for all models of one tokenizer."""
        key = (task.source, task.split, task.limit, task.by, self._tokenizers.fingerprint(name))
        if key not in self._asked:
            self._asked[key] = questions(tokenizer, self._rows(task), by=task.by)
        return self._asked[key]

    def _rows(self, task: Task) -> list[Conversation]:
        """The rows a task asks, none where it brings its own questions."""
        if task.source is None:
            return []
        return self._conversations(task.source, task.split)[: task.limit]

    def _track(self, title: str, items: Any, total: int) -> Any:
        return self.display.track(items, title, total)

    def _loaded(self, name: str) -> tuple[Any, Any]:
        model = load_frozen(self.folder.model(name), device=self._device)
        return model, self._tokenizers.of(name)

    def _read(self, source: str, split: Any) -> list[Conversation]:
        return read_split(self.folder.source(source), split)

    def _fingerprint(self, model: str, task: Task) -> str:
        return digest(
            _FORMAT,
            dataclasses.asdict(task),
            task.lm_eval and definitions_digest(task.lm_eval),
            self._model_fingerprint(model),
            self._tokenizers.fingerprint(model),
            task.teacher and self._model_fingerprint(task.teacher),
            [(conversation_digest(c).hex(), c.fields) for c in self._rows(task)],
        )

    def _model_fingerprint(self, name: str) -> str:
        if name not in self._fingerprints:
            self._fingerprints[name] = model_fingerprint(self.folder.model(name))
        return self._fingerprints[name]


def _check_questions(info: ModelInfo, asked: Sequence[Question], *, where: str) -> None:
    """Refuse questions that a model cannot place or has no embedding for."""
    ids = [question.encoded.input_ids for question in asked]
    check_context(
        info, max(map(len, ids)), where=where, do="take the longest rows out of the split"
    )
    check_vocabulary(info, max(map(max, ids)), where=where)


def _told(result: Mapping[str, Any]) -> str:
    """A score with its interval in percent, and how many outputs were of no valid form."""
    low, high = (100 * end for end in result["interval"])
    told = f"{100 * result['score']:.1f} % ({low:.1f} to {high:.1f})"
    invalid = result.get("invalid", 0.0)
    return f"{told}, {100 * invalid:.1f} % of outputs invalid" if invalid else told


def _kept_items(path: Path) -> Items | None:
    """What a kept score was computed from, None where it did not say."""
    try:
        return Items(**read_checksummed(path)["items"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _kept_result(path: Path, fingerprint: str) -> dict[str, Any] | None:
    """What was scored before and still holds; None where nothing does, or it cannot be read."""
    try:
        kept = read_checksummed(path)
        whole = manifest_error(path.parent, kept.get("samples", {})) is None
        if whole and kept["fingerprint"] == fingerprint and 0 <= kept["result"]["score"] <= 1:
            result: dict[str, Any] = kept["result"]
            return result
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        pass
    return None
