"""Means and how far to trust them."""

from __future__ import annotations

import math
from collections.abc import Sequence


def mean_and_stderr(values: Sequence[float]) -> tuple[float, float]:
    """The mean of independent values and its standard error, 0 for a single value."""
    n = len(values)
    mean = math.fsum(values) / n
    if n < 2:
        return mean, 0.0
    variance = math.fsum((value - mean) ** 2 for value in values) / (n - 1)
    return mean, math.sqrt(variance / n)


def ratio_and_stderr(parts: Sequence[float], wholes: Sequence[float]) -> tuple[float, float]:
    """Σ parts / Σ wholes and its standard error, one pair for each independent cluster.

    Tokens of one conversation are not independent, conversations are: the error is that of the
    ratio estimator over conversations (Cochran, Sampling Techniques, 1977, 2.11).
    """
    n, whole = len(parts), math.fsum(wholes)
    if whole == 0:
        return 0.0, 0.0
    ratio = math.fsum(parts) / whole
    if n < 2:
        return ratio, 0.0
    squares = math.fsum(
        (part - ratio * size) ** 2 for part, size in zip(parts, wholes, strict=True)
    )
    return ratio, math.sqrt(squares * n / (n - 1)) / whole
