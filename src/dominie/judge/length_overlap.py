"""Whether the lengths of two models' answers overlap, so that equal length is known at all."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from dominie.evaluation.statistics import Floats

#: Farthest that equal length may lie from the mean of what was compared, in standard deviations of
#: the fit's covariate. There, half of the variance of a fitted line comes from its slope; beyond,
#: the figure rests on the assumed form more than on preferences. docs/evaluation.md has the gaps
#: to the published figures on both sides of it.
_FARTHEST = 1.0
_TOLD = 100.0  # a distance beyond it is not told to the digit
#: Pairs in which the model's answer is longer, and in which it is shorter, to interpolate between.
_FEWEST_PAIRS = 10


def no_overlap(
    preferences: Sequence[float | None], lengths: Sequence[tuple[int, int]]
) -> str | None:
    """Return why a fit to these rows alone knows nothing of equal length; None if it does.

    Args:
        preferences: 0 to 1 for each row, None if there is none.
        lengths: (baseline's, model's) of each row, in characters.
    """
    known = [(p, m - b) for p, (b, m) in zip(preferences, lengths, strict=True) if p is not None]
    wanted, difference = (np.array(column, dtype=np.float64) for column in zip(*known, strict=True))
    if difference.any() and (why := _one_sided(difference)) is not None:
        return why
    if _contrary(difference, wanted) < 1.0:
        return "who won is always the same, or follows from length alone: a fit has no end"
    return None


def _one_sided(difference: Floats) -> str | None:
    """Return why zero is no place to interpolate at, of lengths the model's minus baseline's."""
    longer = float((difference > 0).sum() + (difference == 0).sum() / 2)
    few, many = sorted((longer, len(difference) - longer))
    side, other = ("longer", "shorter") if longer == many else ("shorter", "longer")
    if (away := distance_of_equal(difference)) > _FARTHEST:
        far = f"{away:.1f}" if away < _TOLD else f"over {_TOLD:g}"
        where = f"equal length lies {far} standard deviations from their mean"
        return (
            f"the answers are {side} than the baseline's in {100 * many / len(difference):.0f} % "
            f"of pairs; {where} (at most {_FARTHEST:g})"
        )
    if few < _FEWEST_PAIRS:
        return f"{few:g} answers are {other} than the baseline's (at least {_FEWEST_PAIRS})"
    return None


def distance_of_equal(difference: Floats) -> float:
    """Return how far equal length lies from the mean of what was compared.

    Args:
        difference: [n] characters of the model's answer minus the baseline's.

    Returns:
        Standard deviations of the fit's covariate; infinite if that has only one value.
    """
    spread = float(difference.std(ddof=1)) if len(difference) > 1 else 0.0
    if not spread > 0:
        return math.inf if difference.any() else 0.0
    covariate = np.tanh(difference / spread)
    deviation = float(covariate.std())  # 0 where far differences all saturate
    return abs(float(covariate.mean())) / deviation if deviation > 0 else math.inf


def _contrary(difference: Floats, wanted: Floats) -> float:
    """Return how many wins contradict the best threshold on length, in either direction.

    Less than one whole win: the rows are separable, and a logistic fit has no maximum.
    """
    order = np.argsort(difference, kind="stable")
    won, cut = wanted[order], np.append(True, np.diff(difference[order]) > 0)
    below = np.concatenate([[0.0], np.cumsum(won)])[:-1]  # wins below each row
    above = won.sum() - below
    count = np.arange(len(won))
    lost_below, lost_above = count - below, len(won) - count - above
    contrary = np.minimum(below + lost_above, lost_below + above)
    return float(contrary[cut].min())  # a threshold lies between two lengths
