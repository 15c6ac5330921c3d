"""Scores every model of a recipe on every task, and keeps what is still true."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from dominie.chat_tokenizers import ChatTokenizers
from dominie.data.conversations import Conversation
from dominie.data.splits import conversation_digest, read_split
from dominie.display import Display
from dominie.errors import InputError
from dominie.evaluation.metrics import Score, agreement, exact_match
from dominie.evaluation.questions import Question, questions
from dominie.fingerprints import digest, model_fingerprint
from dominie.models.agreement import check_context, check_same_tokens, check_vocabulary
from dominie.models.head import check_head, text_config
from dominie.models.loading import load_frozen
from dominie.recipe import Evaluation, Task
from dominie.run_folder import RunFolder


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
    examiner = _Examiner(folder, evaluation, fingerprints, display)
    results = {name: examiner.scores(name) for name in evaluation.models}
    _write_json(folder.path / "results.json", results)
    return results


def _check_trained(folder: RunFolder, evaluation: Evaluation) -> None:
    teachers = [task.teacher for task in evaluation.tasks.values() if task.teacher]
    for name in (*evaluation.models.values(), *teachers):
        if name in folder.recipe.stages and not Path(folder.model(name).path).is_dir():
            raise InputError(
                f"stage {name} has not been trained",
                where=folder.model(name).path,
                do="run `dominie run` first",
            )


class _Examiner:
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

    def scores(self, name: str) -> dict[str, Any]:
        """The scores of one model on all tasks, from file where nothing has changed."""
        model, scores, fresh = self.evaluation.models[name], {}, []
        for task_name, task in self.evaluation.tasks.items():
            kept = self.folder.path / "evaluation" / name / f"{task_name}.json"
            fingerprint = self._fingerprint(model, task)
            result = _kept_result(kept, fingerprint)
            if result is None:
                score = self._score(f"{name} on {task_name}", model, task)
                result = {**score.as_dict(), "metric": task.metric}
                kept.parent.mkdir(parents=True, exist_ok=True)
                lines = "".join(json.dumps(sample) + "\n" for sample in score.samples)
                kept.with_suffix(".jsonl").write_text(lines, encoding="utf-8")
                _write_json(kept, {"fingerprint": fingerprint, "result": result})
                fresh.append(task_name)
            scores[task_name] = result
        told = ", ".join(f"{task} {100 * scores[task]['score']:.1f} %" for task in scores)
        self.display.done(name, told if fresh else f"already scored ({told})")
        return scores

    def _score(self, title: str, name: str, task: Task) -> Score:
        model, tokenizer = self._load(name)
        asked = self._questions(task, name, tokenizer)
        _check_questions(text_config(model), asked, where=title)
        track = functools.partial(self._track, title)
        if task.metric == "exact_match":
            return exact_match(
                model,
                tokenizer,
                asked,
                max_new_tokens=task.max_new_tokens,
                batch=self.evaluation.batch,
                track=track,
            )
        assert task.teacher is not None, "checked by Task"
        teacher, theirs = self._load(task.teacher)
        check_same_tokens(tokenizer, theirs, where=f"{title}, teacher {task.teacher}")
        _check_questions(text_config(teacher), asked, where=f"{title}, teacher {task.teacher}")
        check_head(model, where=name)
        check_head(teacher, where=task.teacher)
        return agreement(model, teacher, asked, batch=self.evaluation.batch, track=track)

    def _questions(self, task: Task, name: str, tokenizer: Any) -> list[Question]:
        """The task's questions, encoded once for all models of one tokenizer."""
        key = (task.source, task.split, task.limit, task.by, self._tokenizers.fingerprint(name))
        if key not in self._asked:
            conversations = self._conversations(task.source, task.split)[: task.limit]
            self._asked[key] = questions(tokenizer, conversations, by=task.by)
        return self._asked[key]

    def _track(self, title: str, items: Any, total: int) -> Any:
        return self.display.track(items, title, total)

    def _loaded(self, name: str) -> tuple[Any, Any]:
        model = load_frozen(self.folder.model(name), device=self._device)
        return model, self._tokenizers.of(name)

    def _read(self, source: str, split: Any) -> list[Conversation]:
        return read_split(self.folder.source(source), split)

    def _fingerprint(self, model: str, task: Task) -> str:
        conversations = self._conversations(task.source, task.split)[: task.limit]
        return digest(
            dataclasses.asdict(task),
            self._model_fingerprint(model),
            self._tokenizers.fingerprint(model),
            task.teacher and self._model_fingerprint(task.teacher),
            [conversation_digest(c).hex() for c in conversations],
        )

    def _model_fingerprint(self, name: str) -> str:
        if name not in self._fingerprints:
            self._fingerprints[name] = model_fingerprint(self.folder.model(name))
        return self._fingerprints[name]


def _check_questions(config: Any, asked: Sequence[Question], *, where: str) -> None:
    """Refuse questions that a model cannot place or has no embedding for."""
    ids = [question.encoded.input_ids for question in asked]
    check_context(
        config, max(map(len, ids)), where=where, do="take the longest rows out of the split"
    )
    check_vocabulary(config, max(map(max, ids)), where=where)


def _kept_result(path: Path, fingerprint: str) -> dict[str, Any] | None:
    """What was scored before and still holds; None where nothing does, or it cannot be read."""
    try:
        kept = json.loads(path.read_text(encoding="utf-8"))
        if kept["fingerprint"] == fingerprint and 0 <= kept["result"]["score"] <= 1:
            result: dict[str, Any] = kept["result"]
            return result
    except (OSError, ValueError, KeyError, TypeError):
        pass
    return None


def _write_json(path: Path, value: Any) -> None:
    scratch = path.with_name(f".{path.name}")
    scratch.write_text(json.dumps(value, indent=1), encoding="utf-8")
    scratch.replace(path)
