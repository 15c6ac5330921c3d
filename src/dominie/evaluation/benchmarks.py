"""What judged benchmarks have in common: questions, answers, cases for a judge, a result."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from dominie.evaluation.answers import Answers, Dialogue
from dominie.evaluation.grades import Items
from dominie.evaluation.judging.judge import Case, Judge, Verdict
from dominie.evaluation.statistics import bootstrap_interval


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


class Exam(Protocol):
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
