"""Rank correlation: whether one thing grows with another, whatever their scales."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt


def spearman(one: Sequence[float], other: Sequence[float]) -> float | None:
    """Spearman's correlation, ties given their mean rank; None where either side is constant."""
    a, b = _ranks(one), _ranks(other)
    if len(a) < 2 or np.ptp(a) == 0 or np.ptp(b) == 0:
        return None
    return float(np.corrcoef(a, b)[0, 1])


def _ranks(values: Sequence[float]) -> npt.NDArray[np.float64]:
    _, place, times = np.unique(np.asarray(values), return_inverse=True, return_counts=True)
    last = np.cumsum(times)
    ranks: npt.NDArray[np.float64] = (last - (times - 1) / 2)[place]
    return ranks
