"""The result of a model on a task, its confidence interval, and whether a difference is noise."""

from __future__ import annotations

import math
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from dominie.core.io import finite, mapping, numbers, sequence, text

RATED = "mt_bench"
"""The metric of ratings from 1 to 10, kept as tenths."""
JUDGED = (RATED, "alpaca_eval")
"""Metrics that a judge decides."""
FORGETTING = "forgetting"
"""The metric of KL(base ‖ model), whose score from 0 to 1 is exp(−KL)."""
LIKENESS = ("agreement", FORGETTING)
"""Metrics of how like another model a model is, which is no ability."""

NORMAL_95 = 1.959964
"""Half-width, in standard errors, of a 95 % interval of the normal distribution."""

_OWN_KEYS = {"score", "stderr", "n", "metric", "groups"}
_JUDGED_EXTRAS = {
    "length_controlled_win_rate",
    "cut",
    "empty",
    "unanswered",
}  # of a judge's many figures, those for a table


@dataclass(frozen=True)
class Interval:
    """An estimate and its confidence interval.

    Attributes:
        estimate: of all items: a score from 0 to 1, or a difference of two.
        low: lower end of the confidence interval.
        high: its upper end.
        stderr: standard error of the estimate, None if not known.
        n: independent clusters it rests on, None if not known.
    """

    estimate: float
    low: float
    high: float
    stderr: float | None = None
    n: int | None = None

    @property
    def ends(self) -> tuple[float, float]:
        """The lower and the upper end."""
        return self.low, self.high

    @property
    def within_noise(self) -> bool:
        """Whether the interval of a difference contains 0, so that neither side is better."""
        return self.low <= 0.0 <= self.high

    def __neg__(self) -> Interval:
        """Return the interval of the difference taken the other way round."""
        return Interval(-self.estimate, -self.high, -self.low, self.stderr, self.n)

    @classmethod
    def from_ends(cls, estimate: object, ends: object) -> Interval | None:
        """Return an interval read from JSON; None unless all are finite numbers in order."""
        value, found = finite(estimate), [finite(end) for end in sequence(ends)]
        if value is None or len(found) != 2 or found[0] is None or found[1] is None:
            return None
        return cls(value, found[0], found[1]) if found[0] <= found[1] else None


@dataclass(frozen=True)
class TaskResult:
    """The result of one model on one task, or on one group of its rows.

    Attributes:
        score: from 0 to 1.
        stderr: its standard error, None if not known.
        n: items it was measured on, None if not known.
        metric: what was measured, by its name in the recipe.
        by: the same by group of rows.
        extras: further figures of the task: `kl` and `loss` in nats per token, `invalid` a rate.
        interval: the 95 % confidence interval as measured, None if not known.
        measure: what was measured, in words for the head of a table.
        controls: of a judged benchmark, what answers of no worth score with the same judge.
        warnings: what a person should know before believing it.
    """

    score: float
    stderr: float | None = None
    n: int | None = None
    metric: str = ""
    by: Mapping[str, TaskResult] = field(default_factory=dict)
    extras: Mapping[str, Any] = field(default_factory=dict)
    interval: Interval | None = None
    measure: str = ""
    controls: Mapping[str, Any] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()

    @classmethod
    def from_interval(cls, found: Interval, n: int | None = None, **more: Any) -> TaskResult:
        """Return the result of an estimate, of `n` items or else the interval's own number."""
        n = found.n if n is None else n
        return cls(found.estimate, found.stderr, n, interval=found, **more)

    @classmethod
    def from_dict(cls, record: object) -> TaskResult | None:
        """Return a result read from `results.json`, whoever wrote it; None without a finite score.

        What is of another type than expected is left out. Of the extras finite numbers are kept,
        and of a judged benchmark's only those that a table shows; of controls their scores.
        """
        given = mapping(record)
        score, stderr, n = (finite(given.get(key)) for key in ("score", "stderr", "n"))
        if score is None:
            return None
        metric = text(given.get("metric")) or ""
        by = {name: cls.from_dict(group) for name, group in mapping(given.get("groups")).items()}
        controls = {
            name: finite(found["score"] if isinstance(found, dict) and "score" in found else found)
            for name, found in mapping(given.get("controls")).items()
        }
        return cls(
            score,
            None if stderr is None else abs(stderr),
            None if n is None else int(n),
            metric,
            by={name: group for name, group in by.items() if group is not None},
            extras={
                key: value
                for key, value in numbers(given).items()
                if (key in _JUDGED_EXTRAS if metric in JUDGED else key not in _OWN_KEYS)
                and math.isfinite(value)
            },
            interval=Interval.from_ends(score, given.get("interval")),
            measure=text(given.get("measure")) or "",
            controls={name: value for name, value in controls.items() if value is not None},
            warnings=tuple(w for w in sequence(given.get("warnings")) if isinstance(w, str)),
        )

    def as_dict(self) -> dict[str, Any]:
        """Return the result as `results.json` holds it; what is not known is left out."""
        known = {
            "score": self.score,
            "stderr": self.stderr,
            "n": self.n,
            "interval": None if self.interval is None else list(self.interval.ends),
            "kl_interval": None if self.kl is None else list(self.kl.ends),
        }
        record: dict[str, Any] = {key: value for key, value in known.items() if value is not None}
        record |= self.extras
        more = {
            "groups": {name: group.as_dict() for name, group in self.by.items()},
            "metric": self.metric,
            "measure": self.measure,
            "controls": dict(self.controls),
            "warnings": list(self.warnings),
        }
        return record | {key: value for key, value in more.items() if value}

    @property
    def invalid(self) -> float:
        """The rate of outputs of another form than the one asked for, 0 if that cannot be."""
        return float(self.extras.get("invalid", 0.0))

    @property
    def kl(self) -> Interval | None:
        """Of the metric `forgetting`: KL(base ‖ model) in nats per token, with its interval.

        The interval is that of the score, exp(−KL), read off the other way round.
        """
        value, own = finite(self.extras.get("kl")), (self.score, self.score)
        if self.metric != FORGETTING or value is None:
            return None
        ends = (
            own if self.score == 1.0 else self.ends or own
        )  # the base itself: nothing to estimate
        low, high = (max(end, sys.float_info.min) for end in ends)
        return Interval(value, min(value, -math.log(high)), max(value, -math.log(low)))

    @property
    def interval95(self) -> Interval | None:
        """The 95 % interval: as measured, else that of the normal distribution.

        With no failure (or no success) among n rows the normal interval has no width, which claims
        too much; the rule of three, 3/n, takes its place.
        """
        if self.interval is not None:
            return self.interval
        score = self.score
        if self.n and not self.stderr and score in (0.0, 1.0):
            unseen = min(1.0, 3.0 / self.n)
            return Interval(score, *((0.0, unseen) if score == 0 else (1.0 - unseen, 1.0)))
        if self.stderr is None:
            return None
        half = NORMAL_95 * self.stderr
        return Interval(score, score - half, score + half, self.stderr)

    @property
    def ends(self) -> tuple[float, float] | None:
        """The ends of `interval95`."""
        found = self.interval95
        return None if found is None else found.ends


def in_nats(kl: Interval) -> str:
    """Return a divergence with its interval as text."""
    return f"KL {kl.estimate:.3g} nats ({kl.low:.3g} to {kl.high:.3g})"


def within_noise(
    one: TaskResult, other: TaskResult, difference: Interval | None = None
) -> bool | None:
    """Return whether the difference between two results cannot be believed.

    Args:
        one: of a model on a task.
        other: of another model on the same task.
        difference: of their scores on the same questions (`paired_differences`), if known. It
            decides; else whether the 95 % intervals overlap, which errs on the side of claiming
            too little.

    Returns:
        None if neither is known.
    """
    if difference is not None:
        return difference.within_noise
    mine, theirs = one.ends, other.ends
    if mine is None or theirs is None:
        return None
    return max(mine[0], theirs[0]) <= min(mine[1], theirs[1])


def square_and_add(one: Interval, other: Interval) -> Interval:
    """Return the interval of a difference of two that are independent (Newcombe 1998).

    Of results on the same questions, which rise and fall together, it is wider than need be.
    """
    (down, up), (down_other, up_other) = _arms(one), _arms(other)
    mean = one.estimate - other.estimate
    return Interval(mean, mean - math.hypot(down, up_other), mean + math.hypot(up, down_other))


def _arms(found: Interval) -> tuple[float, float]:
    """Return how far an interval reaches below and above its estimate."""
    return found.estimate - found.low, found.high - found.estimate


#: Two-sided 95 % quantiles of Student's t, by degrees of freedom from 1; 1.96 beyond.
_STUDENT_95 = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160,
    2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056,
    2.052, 2.048, 2.045, 2.042,
)  # fmt: skip
_ALIKE = 1e-9  # a deviation that is rounding


@dataclass(frozen=True)
class Estimate:
    """A mean, and its 95 % interval if one is known."""

    mean: float
    interval: Interval | None = None

    @property
    def ends(self) -> tuple[float, float] | None:
        """The ends of the interval."""
        return None if self.interval is None else self.interval.ends

    @property
    def half(self) -> float | None:
        """Half of the interval's width."""
        return None if self.interval is None else (self.interval.high - self.interval.low) / 2

    @property
    def significant(self) -> bool:
        """Whether the interval of a difference excludes zero."""
        return self.interval is not None and not self.interval.within_noise


def estimate(values: Sequence[float], on_questions: Sequence[Interval | None] = ()) -> Estimate:
    """Return the mean of independent runs with its 95 % interval.

    Two kinds of chance add up: that of runs, by Student, and that of the questions. Runs share
    their questions, so that more runs do not lessen the second.

    Args:
        values: of each run.
        on_questions: the interval of each value over its questions, where it is known.

    Returns:
        Without an interval if nothing tells how far chance reaches: of a single value, and of
        values that agree, unless that of the questions is known.
    """
    mean = statistics.fmean(values)
    freedom = len(values) - 1
    spread = statistics.stdev(values) if freedom else 0.0
    known = [_arms(interval) for interval in on_questions if interval is not None]
    if spread < _ALIKE and not known:
        return Estimate(mean)
    quantile = _STUDENT_95[freedom - 1] if freedom <= len(_STUDENT_95) else 1.96
    half = quantile * spread / math.sqrt(len(values))
    down, up = (statistics.fmean(arms) for arms in zip(*known, strict=True)) if known else (0, 0)
    return Estimate(
        mean, Interval(mean, mean - math.hypot(half, down), mean + math.hypot(half, up))
    )
