"""From grades of single answers to the score of a model on a task."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from dominie.evaluation.statistics import Interval, bootstrap_interval
from dominie.evaluation.sums import STATISTICS


@dataclass(frozen=True)
class Grade:
    """What one answer counts for.

    Attributes:
        score: how good the answer is by itself, from 0 to 1.
        sums: its part in the sums that a task's score is made of; a mean's are (score, 1).
        valid: whether there was an answer of the form that was asked for.
    """

    score: float
    sums: tuple[float, ...]
    valid: bool = True


def mean_grade(score: float, *, valid: bool = True) -> Grade:
    """A grade of a task whose score is the mean."""
    return Grade(score, (score, 1.0), valid)


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
