"""From the scores of single answers to a task's result, and differences between models."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dominie.core.task_result import TaskResult
from dominie.evaluation.statistics import STATISTICS, bootstrap_interval, paired_differences


@dataclass(frozen=True)
class SampleScore:
    """What one answer counts for.

    Attributes:
        score: how good the answer is by itself, from 0 to 1.
        sums: its part in the sums that a task's score is computed from; a mean's are (score, 1).
        valid: whether there was an answer of the form that was asked for.
    """

    score: float
    sums: tuple[float, ...]
    valid: bool = True

    @classmethod
    def of_mean(cls, score: float, *, valid: bool = True) -> SampleScore:
        """Return the score of an answer in a task whose score is the mean."""
        return cls(score, (score, 1.0), valid)


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
        """Return the items as `evaluation/<model>/<task>.json` holds them."""
        sums = [[int(part) if part == int(part) else part for part in row] for row in self.sums]
        return {"statistic": self.statistic, "clusters": list(self.clusters), "sums": sums}


@dataclass(frozen=True)
class ScoredTask:
    """A task's result with what it was computed from.

    Attributes:
        result: the figures.
        items: each item's part in them.
        samples: one for each item, for people: prompt, target, output, score, correct, group.
    """

    result: TaskResult
    items: Items
    samples: Sequence[Mapping[str, Any]] = ()


def score_items(
    sums: Sequence[Sequence[float]],
    statistic: str,
    *,
    questions: Sequence[str],
    groups: Sequence[str | None] | None = None,
    extras: Mapping[str, float] | None = None,
    samples: Sequence[Mapping[str, Any]] = (),
) -> ScoredTask:
    """Compute a statistic of sums over items with its interval, for all items and by group.

    Args:
        sums: [N, K] each item's part.
        statistic: one of `STATISTICS`.
        questions: [N] what was asked; items of one question are resampled together.
        groups: [N] what the score is broken down by, None if an item is in no group.
        extras: further figures.
        samples: the answers, for people.
    """
    number: dict[str, int] = {}
    clusters = [number.setdefault(question, len(number)) for question in questions]
    rows = np.asarray(sums, dtype=np.float64)

    def result(members: Sequence[int], **more: Any) -> TaskResult:
        found = bootstrap_interval(
            rows[members], [clusters[i] for i in members], statistic=STATISTICS[statistic]
        )
        return TaskResult.from_interval(found, len(members), **more)

    by_group: dict[str, list[int]] = {}
    for i, group in enumerate(groups or ()):
        if group is not None:
            by_group.setdefault(group, []).append(i)
    by = {name: result(members) for name, members in sorted(by_group.items())}
    return ScoredTask(
        result(range(len(rows)), by=by, extras=extras or {}),
        Items(statistic, clusters, [tuple(row) for row in sums]),
        samples,
    )


def compare_models(items: Mapping[str, Items]) -> dict[str, dict[str, Any]]:
    """Compute the differences between all pairs of models on one task.

    Args:
        items: of each model, what its score was computed from.

    Returns:
        `{model: {other: {"difference", "interval": [low, high]}}}`, the difference being the
        model's score less the other's, for models that answered the same questions.
    """
    found: dict[str, dict[str, Any]] = {}
    for names in _with_same_questions(items):
        first = items[names[0]]
        differences = paired_differences(
            {name: items[name].sums for name in names},
            first.clusters,
            statistic=STATISTICS[first.statistic],
        )
        for (one, other), interval in differences.items():
            entry = {"difference": interval.estimate, "interval": list(interval.ends)}
            found.setdefault(one, {})[other] = entry
    return found


def _with_same_questions(items: Mapping[str, Items]) -> list[list[str]]:
    """Group models by what they were asked; drops those asked what no other was."""
    by_questions: dict[tuple[Any, ...], list[str]] = {}
    for name, of_model in items.items():
        if of_model.statistic in STATISTICS:
            key = (of_model.statistic, tuple(of_model.clusters), len(of_model.sums[0]))
            by_questions.setdefault(key, []).append(name)
    return [names for names in by_questions.values() if len(names) > 1]
