"""From scores of single answers to a task's result, and paired differences between models."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from dominie.evaluation.statistics import (
    STATISTICS,
    Interval,
    bootstrap_interval,
    paired_differences,
)


@dataclass(frozen=True)
class SampleScore:
    """What one answer counts for.

    Attributes:
        score: how good the answer is by itself, from 0 to 1.
        sums: its part in the sums that a task's score is made of; a mean's are (score, 1).
        valid: whether there was an answer of the form that was asked for.
    """

    score: float
    sums: tuple[float, ...]
    valid: bool = True


def mean_grade(score: float, *, valid: bool = True) -> SampleScore:
    """A grade of a task whose score is the mean."""
    return SampleScore(score, (score, 1.0), valid)


@dataclass(frozen=True)
class Items:
    """What a score was computed from, item by item, so that models can be compared in pairs.

    Attributes:
        statistic: name of the function of sums, one of `STATISTICS`.
        clusters: which question each item belongs to.
        sums: [N, K] each item's part.
    """

    statistic: str
    clusters: Sequence[int]
    sums: Sequence[Sequence[float]]

    def as_dict(self) -> dict[str, Any]:
        """As `evaluation/<model>/<task>.json` keeps them."""
        sums = [[int(part) if part == int(part) else part for part in row] for row in self.sums]
        return {"statistic": self.statistic, "clusters": list(self.clusters), "sums": sums}


@dataclass(frozen=True)
class Score:
    """How a model did on a task.

    Attributes:
        score: from 0 to 1.
        stderr: its standard error.
        n: items it was measured on.
        interval: where it lies with 95 % confidence.
        groups: the same by group of items.
        extras: further figures, `kl` and `loss` in nats per token, `invalid` a rate.
        samples: one for each item: prompt, target, output, score, correct, group.
        items: what the score was computed from.
    """

    score: float
    stderr: float
    n: int
    interval: tuple[float, float]
    groups: Mapping[str, Score] = field(default_factory=dict)
    extras: Mapping[str, float] = field(default_factory=dict)
    samples: Sequence[Mapping[str, Any]] = ()
    items: Items | None = None

    def as_dict(self) -> dict[str, Any]:
        """The figures as `results.json` holds them."""
        figures: dict[str, Any] = {
            "score": self.score,
            "stderr": self.stderr,
            "n": self.n,
            "interval": list(self.interval),
        }
        figures |= self.extras
        if self.groups:
            figures["groups"] = {name: group.as_dict() for name, group in self.groups.items()}
        return figures


def scored(
    sums: Sequence[Sequence[float]],
    statistic: str,
    *,
    questions: Sequence[str],
    groups: Sequence[str | None] | None = None,
    extras: Mapping[str, float] | None = None,
    samples: Sequence[Mapping[str, Any]] = (),
) -> Score:
    """A statistic of sums over items with its interval, for all items and by group.

    Args:
        sums: [N, K] each item's part.
        statistic: one of `STATISTICS`.
        questions: [N] what was asked; items of one question are resampled together.
        groups: [N] what the score is broken down by, None where an item is in no group.
        extras: further figures.
        samples: the answers, for people.
    """
    number: dict[str, int] = {}
    clusters = [number.setdefault(question, len(number)) for question in questions]
    rows = np.asarray(sums, dtype=np.float64)

    def interval(members: Sequence[int]) -> Interval:
        return bootstrap_interval(
            rows[members], [clusters[i] for i in members], statistic=STATISTICS[statistic]
        )

    by_group: dict[str, list[int]] = {}
    for i, group in enumerate(groups or ()):
        if group is not None:
            by_group.setdefault(group, []).append(i)
    return _score(
        interval(range(len(rows))),
        len(rows),
        groups={
            name: _score(interval(members), len(members))
            for name, members in sorted(by_group.items())
        },
        extras=extras or {},
        samples=samples,
        items=Items(statistic, clusters, [tuple(row) for row in sums]),
    )


def _score(found: Interval, n: int, **more: Any) -> Score:
    return Score(found.estimate, found.stderr, n, (found.low, found.high), **more)


def compared(items: Mapping[str, Items]) -> dict[str, dict[str, Any]]:
    """The differences between all pairs of models on one task.

    Args:
        items: of each model, what its score was computed from.

    Returns:
        `{model: {other: {"difference", "interval": [low, high], "verdict"}}}`, the difference
        being the model's score less the other's, for models that answered the same questions.
    """
    found: dict[str, dict[str, Any]] = {}
    for alike in _alike(items):
        first = items[alike[0]]
        differences = paired_differences(
            {name: items[name].sums for name in alike},
            first.clusters,
            statistic=STATISTICS[first.statistic],
        )
        for (one, other), interval in differences.items():
            verdict = "within noise" if interval.within_noise else "better"
            if interval.high < 0:
                verdict = "worse"
            found.setdefault(one, {})[other] = {
                "difference": interval.estimate,
                "interval": [interval.low, interval.high],
                "verdict": verdict,
            }
    return found


def _alike(items: Mapping[str, Items]) -> list[list[str]]:
    """Models by what they were asked; those asked what nobody else was are left out."""
    by_questions: dict[tuple[Any, ...], list[str]] = {}
    for name, of_model in items.items():
        if of_model.statistic in STATISTICS:
            key = (of_model.statistic, tuple(of_model.clusters), len(of_model.sums[0]))
            by_questions.setdefault(key, []).append(name)
    return [names for names in by_questions.values() if len(names) > 1]
