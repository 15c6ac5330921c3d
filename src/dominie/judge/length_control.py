"""Win rates from preferences, as they are and at equal length."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from dominie.core.task_result import NORMAL_95
from dominie.evaluation.statistics import Floats, mean_and_stderr


@dataclass(frozen=True)
class WinRate:
    """How often a model is preferred to a baseline. Fractions, not percent.

    Attributes:
        win_rate: mean of preference - 1.
        standard_error: of that mean.
        discrete_win_rate: the same with every preference rounded to a side; a draw is half a win.
        n: preferences that count.
        wins, losses, draws: those above a half, below, and of exactly a half.
        excluded: rows without a preference, or with one that is none.
    """

    win_rate: float
    standard_error: float
    discrete_win_rate: float
    n: int
    wins: int
    losses: int
    draws: int
    excluded: int


def wins(preferences: Sequence[object]) -> list[float | None]:
    """Return preference - 1 for each row, None without a preference from 1 to 2.

    Upstream writes a draw as 1.5 or, in old files, as 0.
    """
    return [_win(preference) for preference in preferences]


def _win(preference: object) -> float | None:
    if isinstance(preference, bool) or not isinstance(preference, int | float):
        return None
    value = 1.5 if preference == 0 else float(preference)
    return value - 1.0 if 1.0 <= value <= 2.0 else None  # not a number compares false


def win_rate(preferences: Sequence[object]) -> WinRate | None:
    """Return the win rate over all rows with a preference, None if no row has one."""
    found = [value for value in wins(preferences) if value is not None]
    if not found:
        return None
    mean, error = mean_and_stderr(found)
    won, lost = sum(value > 0.5 for value in found), sum(value < 0.5 for value in found)
    draws = len(found) - won - lost
    return WinRate(
        win_rate=mean,
        standard_error=error,
        discrete_win_rate=(won + draws / 2) / len(found),
        n=len(found),
        wins=won,
        losses=lost,
        draws=draws,
        excluded=len(preferences) - len(found),
    )


def longer_wins(lengths: Sequence[tuple[int, int]], values: Sequence[float | None]) -> float | None:
    """Return the share of decided pairs that the longer answer won, None if none is decided.

    Args:
        lengths: (baseline's, model's) of each pair.
        values: 0 to 1, above a half if the model won.
    """
    agreed = [
        (model > baseline) == (value > 0.5)
        for (baseline, model), value in zip(lengths, values, strict=True)
        if value is not None and not math.isclose(value, 0.5) and model != baseline
    ]
    return sum(agreed) / len(agreed) if agreed else None


_STRENGTHS = np.logspace(-4, 4, 10)
_FOLDS = 5
#: Weight of the answers of models instructed to be short or long, both together.
_GAMED_WEIGHT = 0.2


@dataclass(frozen=True)
class Gamed:
    """Preferences of baselines instructed to be terse and verbose, which regularise the fit.

    Attributes:
        preference: from 0 to 1.
        difference: standardised difference in length.
        difficulty: of the instruction.
    """

    preference: Floats
    difference: Floats
    difficulty: Floats


@dataclass(frozen=True)
class LengthControlled:
    """A length-controlled win rate. Fractions, not percent.

    Attributes:
        win_rate: at equal length.
        standard_error: of it, robust to how preferences scatter.
        spread_error: what upstream prints beside it: standard error of the mean of the
            predictions, which is 0 without difficulty.
        length_effect: the coefficient of the difference in length: below 0 longer answers win.
        strength: of the fit; the inverse of its penalty.
        without_terms: whether the penalty has left no term of the model.
    """

    win_rate: float
    standard_error: float
    spread_error: float
    length_effect: float
    strength: float
    without_terms: bool = False

    @property
    def bounded(self) -> bool:
        """Whether its 95 % interval excludes anything: half as wide as all rates, it does not."""
        return NORMAL_95 * self.standard_error < 0.5  # not a number compares false


def length_controlled(
    preferences: Sequence[float | None],
    lengths: Sequence[tuple[int, int]],
    *,
    difficulty: Sequence[float] | None = None,
    gamed: Gamed | None = None,
) -> LengthControlled:
    """Return the win rate at equal length.

    Args:
        preferences: 0 to 1 for each row, None if there is none: such a row counts in the
            prediction, not in the fit, as upstream has it.
        lengths: (baseline's, model's) of each row, in characters.
        difficulty: of each row's instruction; None leaves it out.
        gamed: needs a difficulty.

    Raises:
        ValueError: no preference at all, or rows of different number.
    """
    wanted = np.array([math.nan if p is None else p for p in preferences], dtype=np.float64)
    known = ~np.isnan(wanted)
    if not known.any():
        raise ValueError("there is no preference to fit")
    difference = np.array([a - b for a, b in lengths], dtype=np.float64)
    spread = float(difference.std(ddof=1)) if len(difference) > 1 else 0.0
    columns = [np.tanh(difference / spread) if spread > 0 else np.zeros_like(difference)]
    if difficulty is not None:
        columns.append(np.asarray(difficulty, dtype=np.float64))
    columns.append(np.ones_like(difference))
    rows = np.stack(columns, axis=1)
    at_equal_length = rows.copy()
    at_equal_length[:, 0] = 0.0
    weights = np.ones(len(rows))
    fitted, wanted, weights = rows[known], wanted[known], weights[known]
    if gamed is not None:
        theirs = [np.tanh(gamed.difference), gamed.difficulty, np.zeros_like(gamed.difference)]
        fitted = np.concatenate([np.stack(theirs, axis=1), fitted])
        wanted = np.concatenate([gamed.preference, wanted])
        light = np.full(len(gamed.preference), _GAMED_WEIGHT / 2)
        weights = np.concatenate([light, weights])
    coefficients, strength = _cross_validated(fitted, wanted, weights)
    predicted = _logistic(at_equal_length @ coefficients)
    slope = (predicted * (1 - predicted)) @ at_equal_length / len(predicted)
    covariance = _sandwich(fitted, wanted, weights, coefficients)
    return LengthControlled(
        win_rate=float(predicted.mean()),
        standard_error=float(np.sqrt(max(0.0, slope @ covariance @ slope))),
        spread_error=float(predicted.std(ddof=1) / np.sqrt(len(predicted)))
        if len(predicted) > 1
        else 0.0,
        length_effect=float(coefficients[0]),
        strength=strength,
        without_terms=not coefficients.any(),
    )


def _cross_validated(rows: Floats, wanted: Floats, weights: Floats) -> tuple[Floats, float]:
    """Return coefficients fitted to all rows, at the strength best for held-out rows."""
    fold = np.arange(len(rows))[::-1] % _FOLDS
    scores = np.zeros(len(_STRENGTHS))
    for held_out in range(min(_FOLDS, len(rows)) if len(rows) > 1 else 0):
        test = fold == held_out
        start = np.zeros(rows.shape[1])
        for i, strength in enumerate(_STRENGTHS):
            start = _fitted(rows[~test], wanted[~test], weights[~test], strength, start)
            scores[i] -= _losses(rows[test] @ start, wanted[test], weights[test]).mean()
    best = float(_STRENGTHS[int(np.argmax(scores))])
    return _fitted(rows, wanted, weights, best, np.zeros(rows.shape[1])), best


def _fitted(
    rows: Floats, wanted: Floats, weights: Floats, strength: float, start: Floats
) -> Floats:
    """Minimise ‖β‖₁ + strength Σ weight · log loss, by coordinate descent with Newton steps.

    A target between 0 and 1 is that share of a win; the problem stays convex.
    """
    beta = start.copy()
    for _ in range(2000):
        largest = 0.0
        for j in range(len(beta)):
            scores = rows @ beta
            p = _logistic(scores)
            slope = strength * float(weights * (p - wanted) @ rows[:, j])
            curve = strength * float(weights * p * (1 - p) @ rows[:, j] ** 2) + 1e-12
            step = _shrunk(beta[j] - slope / curve, 1.0 / curve) - beta[j]
            step *= _shortened(rows, wanted, weights, strength, beta, j, step, slope)
            beta[j] += step
            largest = max(largest, abs(step))
        if largest < 1e-9:
            break
    return beta


def _shortened(
    rows: Floats,
    wanted: Floats,
    weights: Floats,
    strength: float,
    beta: Floats,
    j: int,
    step: float,
    slope: float,
) -> float:
    """Return the fraction of a step to take, so that the objective falls (Armijo)."""
    if abs(step) < 1e-12:
        return 1.0
    scores = rows @ beta
    before = strength * _losses(scores, wanted, weights).sum() + abs(beta[j])
    promised = slope * step + abs(beta[j] + step) - abs(beta[j])
    share = 1.0
    for _ in range(40):
        after = strength * _losses(scores + share * step * rows[:, j], wanted, weights).sum()
        if after + abs(beta[j] + share * step) - before <= 0.01 * share * promised + 1e-12:
            break
        share /= 2
    return share


def _shrunk(value: float, by: float) -> float:
    """Return a value moved towards zero, at most to it."""
    return math.copysign(max(abs(value) - by, 0.0), value)


def _losses(scores: Floats, wanted: Floats, weights: Floats) -> Floats:
    """Return [n] weighted log losses of logits."""
    loss: Floats = weights * (np.logaddexp(0.0, scores) - wanted * scores)
    return loss


def _sandwich(rows: Floats, wanted: Floats, weights: Floats, beta: Floats) -> Floats:
    """Return the coefficients' covariance (Huber 1967, White 1982), without the penalty."""
    p = _logistic(rows @ beta)
    bread = np.linalg.pinv((rows * (weights * p * (1 - p))[:, None]).T @ rows)
    scores = rows * (weights * (p - wanted))[:, None]
    covariance: Floats = bread @ (scores.T @ scores) @ bread
    return covariance


def _logistic(x: Floats) -> Floats:
    p: Floats = np.exp(-np.logaddexp(0.0, -x))
    return p
