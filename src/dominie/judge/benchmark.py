"""What judged benchmarks have in common: questions, kept answers, cases for a judge, a result."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from dominie.core.errors import InputError
from dominie.evaluation.results import Items
from dominie.evaluation.statistics import bootstrap_interval
from dominie.generation.calls import Advance, Ledger, call_key
from dominie.generation.generator import Dialogue, Generator
from dominie.judge.judge import Case, Judge, Verdict

#: Answers by the id of their dialogue, one text for each turn.
Answers = Mapping[int | str, Sequence[str]]


class AnswerFile:
    """Answers in a benchmark's published shape, one line each, with a `key` beside it.

    Args:
        path: JSON Lines.
        line: a dialogue and its answers as the benchmark writes them.
        turns: the answers in such a line.
    """

    def __init__(
        self,
        path: Path,
        *,
        line: Callable[[Dialogue, Sequence[str]], dict[str, Any]],
        turns: Callable[[Mapping[str, Any]], Sequence[str]],
    ) -> None:
        self.path, self._line, self._turns = path, line, turns

    def complete(
        self, dialogues: Sequence[Dialogue], speaker: Generator, advance: Advance
    ) -> Answers:
        """All answers: those in the file that are still true, the others asked for now.

        When all are there, the file is rewritten to hold them alone, in the order of the questions.

        Raises:
            InputError: a line that does not hold answers.
        """
        ledger = Ledger(self.path)
        keys = {d.id: call_key(speaker.identity, d.turns, d.temperature) for d in dialogues}
        found = {d.id: self._read(kept[-1]) for d in dialogues if (kept := ledger.of(keys[d.id]))}

        def done(dialogue: Dialogue, turns: Sequence[str]) -> None:
            ledger.append({"key": keys[dialogue.id], **self._line(dialogue, turns)})
            found[dialogue.id] = list(turns)

        waiting = [d for d in dialogues if d.id not in found]
        try:
            if waiting:
                speaker.speak(waiting, done, advance)
        finally:
            ledger.close()
        self._rewrite([ledger.of(keys[d.id])[-1] for d in dialogues])
        return {d.id: found[d.id] for d in dialogues}

    def _read(self, record: Mapping[str, Any]) -> Sequence[str]:
        try:
            turns = self._turns(record)
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

    def _rewrite(self, records: Sequence[Mapping[str, Any]]) -> None:
        text = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
        if self.path.exists() and self.path.read_text(encoding="utf-8") == text:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        scratch = self.path.with_name(f".{self.path.name}")
        scratch.write_text(text, encoding="utf-8")
        scratch.replace(self.path)


@dataclass(frozen=True)
class Judged:
    """What a judge's verdicts on a model come to.

    Attributes:
        figures: as `results.json` holds them, without the score where too little was scored.
        scored: verdicts that could be read.
        total: verdicts that were asked for.
        rows: one for each question, for people to look at.
        files: what is written beside them in the benchmark's published shapes, by name.
        items: what the score is made of, so that models can be compared in pairs.
    """

    figures: dict[str, Any]
    scored: int
    total: int
    rows: Sequence[Mapping[str, Any]]
    files: Mapping[str, Sequence[Mapping[str, Any]]]
    items: Items


class Benchmark(Protocol):
    """A benchmark, its files read."""

    @property
    def judge(self) -> Judge:
        """Who judges."""

    @property
    def dialogues(self) -> Sequence[Dialogue]:
        """What every model is asked."""

    @property
    def sample(self) -> Sequence[Dialogue]:
        """What the controls are judged on."""

    @property
    def max_new_tokens(self) -> int:
        """Longest answer."""

    @property
    def seed(self) -> int:
        """Of sampled answers."""

    def line(self, dialogue: Dialogue, turns: Sequence[str], model: str) -> dict[str, Any]:
        """Answers in the benchmark's published shape."""

    def turns(self, line: Mapping[str, Any]) -> Sequence[str]:
        """The answers in such a line."""

    def cases(self, answers: Answers) -> list[Case]:
        """Everything the judge is asked about these answers, in a fixed order."""

    def judged(self, answers: Answers, verdicts: Sequence[Verdict], model: str) -> Judged:
        """What the verdicts on `cases(answers)` come to."""


def interval_figures(values: Sequence[float], clusters: Sequence[Any]) -> dict[str, Any]:
    """Mean from 0 to 1 with its uncertainty, `n` independent clusters."""
    found = bootstrap_interval(values, clusters)
    return {
        "score": found.estimate,
        "stderr": found.stderr,
        "n": found.n,
        "interval": [found.low, found.high],
    }


def grouped_figures(
    values: Sequence[float], clusters: Sequence[Any], groups: Sequence[str]
) -> dict[str, dict[str, Any]]:
    """The same for each group, in order of appearance."""
    found = {}
    for name in dict.fromkeys(groups):
        members = [i for i, group in enumerate(groups) if group == name]
        found[name] = interval_figures([values[i] for i in members], [clusters[i] for i in members])
    return found


def paired_items(values: Sequence[float | None], clusters: Sequence[int]) -> Items:
    """Values from 0 to 1 for comparison in pairs; what is unscored weighs nothing."""
    sums = [(0.0, 0.0) if value is None else (value, 1.0) for value in values]
    return Items("ratio", list(clusters), sums)


def spread_out(items: Sequence[Dialogue], most: int) -> Sequence[Dialogue]:
    """At most so many of the items, evenly over all of them."""
    if len(items) <= most:
        return items
    return [items[i * len(items) // most] for i in range(most)]
