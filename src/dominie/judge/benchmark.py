"""What judged benchmarks have in common: questions, kept answers, cases for a judge, a result."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from dominie.core.display import Advance
from dominie.core.errors import InputError
from dominie.core.io import write_atomic
from dominie.core.task_result import TaskResult
from dominie.data.formats import Message
from dominie.evaluation.score_items import Items
from dominie.evaluation.statistics import bootstrap_interval
from dominie.generation.endpoint import STRICT
from dominie.generation.generator import Generation, GenerationRequest, Generator, Sampling
from dominie.generation.reply_log import ReplyLog, call_key, record_line
from dominie.judge.judge import Case, Judge, Verdict


@dataclass(frozen=True)
class Dialogue:
    """A question of one or several turns, each of which is asked after the answer before it.

    Attributes:
        id: of the question.
        turns: of the user.
        temperature: of the answers.
    """

    id: int | str
    turns: tuple[str, ...]
    temperature: float = 0.0

    def next_turn(self, answers: Sequence[str]) -> list[Message]:
        """Return the conversation up to the turn that follows on these answers."""
        messages: list[Message] = []
        for turn, answer in zip(self.turns, answers, strict=False):
            messages.append({"role": "user", "content": turn})
            messages.append({"role": "assistant", "content": answer})
        return [*messages, {"role": "user", "content": self.turns[len(answers)]}]


#: Answers by the id of their dialogue, one text for each turn.
Answers = Mapping[int | str, Sequence[str]]


def answer_dialogues(
    generator: Generator,
    dialogues: Sequence[Dialogue],
    on_complete: Callable[[Dialogue, Sequence[str]], None],
    advance: Advance | None = None,
    *,
    max_new_tokens: int,
    seed: int = 0,
    keep_thoughts: bool = False,
    on_turn: Callable[[Dialogue, Generation], None] = lambda *_: None,
) -> None:
    """Have a generator answer dialogues turn by turn.

    A dialogue with a turn that stays unanswered is not complete.

    Args:
        dialogues: to answer, several at a time and in any order.
        on_complete: called with a dialogue and its answers as soon as all its turns are answered.
        max_new_tokens: longest answer to a turn.
        keep_thoughts: whether a model's thoughts are part of its answers.
        on_turn: called with each result before that, one that is unanswered, too.
    """
    answers: list[list[str]] = [[] for _ in dialogues]

    def request(index: int) -> GenerationRequest:
        return GenerationRequest(
            messages=dialogues[index].next_turn(answers[index]),
            sampling=_sampling(dialogues[index], max_new_tokens, seed),
        )

    def on_result(index: int, result: Generation) -> GenerationRequest | None:
        on_turn(dialogues[index], result)
        if result.stop_reason == "unanswered":
            return None
        answers[index].append(result.parted(keep_thoughts=keep_thoughts).answer)
        if len(answers[index]) < len(dialogues[index].turns):
            return request(index)
        on_complete(dialogues[index], answers[index])
        return None

    generator.generate([request(i) for i in range(len(dialogues))], on_result, advance=advance)


def _sampling(dialogue: Dialogue, max_new_tokens: int, seed: int) -> Sampling:
    return Sampling(max_new_tokens=max_new_tokens, temperature=dialogue.temperature, seed=seed)


_FAILED = "$ERROR$"
"""What FastChat writes for an answer if the call failed."""


def failed_answers(answers: Mapping[Any, Sequence[object]], what: str) -> str | None:
    """Return a warning of answers that are none: empty, null, or the mark of a failed call.

    Args:
        answers: the turns of each, by what names it.
        what: whose they are.
    """
    failed = [
        name
        for name, turns in answers.items()
        if any(not isinstance(t, str) or t.strip() in ("", _FAILED) for t in turns)
    ]
    if not failed:
        return None
    return (
        f"{len(failed)} of {len(answers)} {what} are empty or the mark of a failed call "
        f"({_FAILED}), {failed[0]!r:.60} the first: whatever is judged of them is no answer"
    )


class AnswersFile:
    """Answers in a benchmark's published shape, one line each, with a `key` beside it.

    Args:
        model: the recipe's name of the model that answers.
        keep_thoughts: whether its thoughts are part of its answers.

    Attributes:
        unanswered: why a dialogue has no answers, by its id; after `complete`.
        stops: how each turn of the others ended.
    """

    def __init__(
        self, path: Path, benchmark: Benchmark, model: str, *, keep_thoughts: bool = False
    ) -> None:
        self.path, self._benchmark, self._model = path, benchmark, model
        self._keep_thoughts = keep_thoughts
        self.unanswered: dict[int | str, str] = {}
        self.stops: dict[int | str, list[str]] = {}

    def complete(self, generator: Generator, advance: Advance | None = None) -> Answers:
        """Return all answers: those in the file that still hold; the others are generated now.

        What an endpoint does not answer is left out, and asked for again the next time. The file is
        then rewritten to hold these answers alone, in the order of the questions.

        Raises:
            InputError: a line that holds no answers.
        """
        benchmark, log = self._benchmark, ReplyLog(self.path)
        keys = {d.id: self._key(generator, d) for d in benchmark.dialogues}
        found = {
            d.id: self._read(kept[-1]) for d in benchmark.dialogues if (kept := log.of(keys[d.id]))
        }
        results: dict[int | str, list[Generation]] = defaultdict(list)

        def on_turn(dialogue: Dialogue, result: Generation) -> None:
            results[dialogue.id].append(result)
            if result.stop_reason == "unanswered":
                self.unanswered[dialogue.id] = result.reason

        def on_complete(dialogue: Dialogue, turns: Sequence[str]) -> None:
            row = benchmark.answer_row(dialogue, turns, self._model)
            ends = [result.stop_reason for result in results[dialogue.id]]
            parted = [r.parted(keep_thoughts=self._keep_thoughts) for r in results[dialogue.id]]
            thoughts = [each.thoughts for each in parted]
            more = {"stops": ends, **({"thoughts": thoughts} if any(thoughts) else {})}
            log.append({"key": keys[dialogue.id], **row, **more})
            found[dialogue.id] = list(turns)

        if waiting := [d for d in benchmark.dialogues if d.id not in found]:
            answer_dialogues(
                generator,
                waiting,
                on_complete,
                advance,
                max_new_tokens=benchmark.max_new_tokens,
                seed=benchmark.seed,
                keep_thoughts=self._keep_thoughts,
                on_turn=on_turn,
            )
        answered = [d for d in benchmark.dialogues if d.id in found]
        kept = [log.of(keys[d.id])[-1] for d in answered]
        self.stops = {d.id: row.get("stops", []) for d, row in zip(answered, kept, strict=True)}
        text = "".join(record_line(record) for record in kept)
        if answered and self.path.read_text(encoding="utf-8") != text:
            write_atomic(self.path, text)
        return {d.id: found[d.id] for d in answered}

    def _key(self, generator: Generator, dialogue: Dialogue) -> str:
        sampling = _sampling(dialogue, self._benchmark.max_new_tokens, self._benchmark.seed)
        identity = generator.identity(sampling)
        answers = "with thoughts" if self._keep_thoughts else "without thoughts"
        return call_key(identity, dialogue.turns, dialogue.temperature, answers)

    def _read(self, record: Mapping[str, Any]) -> Sequence[str]:
        try:
            turns = self._benchmark.answers_in(record)
            if all(isinstance(turn, str) for turn in turns):
                return turns
        except (LookupError, TypeError):
            pass
        raise InputError(
            "a line that holds no answers",
            where=str(self.path),
            found=json.dumps(record)[:120],
            do="remove this line; the question is then asked again",
        )


@dataclass(frozen=True)
class Judged:
    """The result of a model on a judged benchmark.

    Attributes:
        figures: as `results.json` holds them, without the score if too little was scored.
        scored: verdicts that could be read.
        total: verdicts that were asked for.
        rows: one for each question, for people to look at.
        files: what is written beside them in the benchmark's published shapes, by name.
        items: the parts of the score, so that models can be compared in pairs.
    """

    figures: dict[str, Any]
    scored: int
    total: int
    rows: Sequence[Mapping[str, Any]]
    files: Mapping[str, Sequence[Mapping[str, Any]]]
    items: Items


@dataclass(frozen=True, kw_only=True)
class BenchmarkSettings:
    """What every judged benchmark has in a recipe.

    Attributes:
        judge: of the answers.
        limit: the first questions only.
        max_new_tokens: longest answer to a turn.
        control_questions: how many questions the controls are judged on.
        seed: of sampled answers.
        keep_thoughts: whether what a model thinks before it answers is judged, too.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT
    judge: Judge
    limit: int | None = None
    max_new_tokens: int = 1024
    control_questions: int = 40
    seed: int = 0
    keep_thoughts: bool = False

    def __post_init__(self) -> None:
        for name in ("limit", "max_new_tokens", "control_questions"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")


class Benchmark(ABC):
    """A judged benchmark whose files have been read.

    Args:
        notes: what a person should know of these files.
    """

    def __init__(
        self,
        settings: BenchmarkSettings,
        dialogues: Sequence[Dialogue],
        notes: Sequence[str | None] = (),
    ) -> None:
        self.notes = [note for note in notes if note is not None]
        self.judge, self.seed = settings.judge, settings.seed
        self.max_new_tokens, self.keep_thoughts = settings.max_new_tokens, settings.keep_thoughts
        self.dialogues = dialogues
        # The questions on which the controls are judged, evenly over all of them.
        count = min(settings.control_questions, len(dialogues))
        self.control_dialogues = [dialogues[i * len(dialogues) // count] for i in range(count)]

    @abstractmethod
    def answer_row(self, dialogue: Dialogue, turns: Sequence[str], model: str) -> dict[str, Any]:
        """Return answers in the benchmark's published shape."""

    @abstractmethod
    def answers_in(self, row: Mapping[str, Any]) -> Sequence[str]:
        """Return the answers in such a row."""

    @abstractmethod
    def cases(self, answers: Answers) -> list[Case]:
        """Return all that the judge is asked about these answers, in a fixed order."""

    @abstractmethod
    def judged(self, answers: Answers, verdicts: Sequence[Verdict], model: str) -> Judged:
        """Return the result of the verdicts on `cases(answers)`."""


def interval_figures(
    values: Sequence[float], clusters: Sequence[Any], groups: Sequence[str]
) -> dict[str, Any]:
    """Return the mean from 0 to 1 with its interval, for all values and by group.

    `n` counts independent clusters.
    """

    def result(members: Sequence[int], **more: Any) -> TaskResult:
        found = bootstrap_interval([values[i] for i in members], [clusters[i] for i in members])
        return TaskResult.from_interval(found, **more)

    by_group: dict[str, list[int]] = {}
    for i, group in enumerate(groups):
        by_group.setdefault(group, []).append(i)
    by = {name: result(members) for name, members in by_group.items()}
    return result(range(len(values)), by=by).as_dict()


def paired_items(values: Sequence[float | None], clusters: Sequence[int]) -> Items:
    """Return values from 0 to 1 for comparison in pairs; what is unscored weighs nothing."""
    sums = [(0.0, 0.0) if value is None else (value, 1.0) for value in values]
    return Items("ratio", list(clusters), sums)
