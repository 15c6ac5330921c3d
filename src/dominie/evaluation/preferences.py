"""Win rates from preferences: 1 for the baseline, 2 for the model, anything between for a doubt."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from dominie.evaluation.statistics import mean_and_stderr


@dataclass(frozen=True)
class WinRate:
    """How often a model is preferred to a baseline. Fractions, not percent.

    Attributes:
        win_rate: mean of preference - 1.
        standard_error: of that mean.
        discrete_win_rate: the same with every preference rounded to a side; a draw is half a win.
        n: preferences that count.
        wins: those above a half.
        losses: those below.
        draws: those of exactly a half.
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
    """Preference - 1 for each row, None where there is no preference from 1 to 2.

    Upstream writes a draw as 1.5 or, in old files, as 0.
    """
    return [_win(preference) for preference in preferences]


def _win(preference: object) -> float | None:
    if isinstance(preference, bool) or not isinstance(preference, int | float):
        return None
    value = 1.5 if preference == 0 else float(preference)
    return value - 1.0 if 1.0 <= value <= 2.0 else None  # not a number compares false


def win_rate(preferences: Sequence[object]) -> WinRate | None:
    """The win rate over all rows with a preference, None where no row has one."""
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
    """Share of decided pairs in which the longer answer won, None where none is decided.

    Args:
        lengths: (baseline's, model's) of each pair.
        values: 0 to 1, above a half where the model won.
    """
    agreed = [
        (model > baseline) == (value > 0.5)
        for (baseline, model), value in zip(lengths, values, strict=True)
        if value is not None and not math.isclose(value, 0.5) and model != baseline
    ]
    return sum(agreed) / len(agreed) if agreed else None
