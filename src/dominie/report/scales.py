"""Axes: from data to positions, with ticks at round numbers."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

from dominie.report.formats import MINUS

if TYPE_CHECKING:
    from collections.abc import Iterable

_LOG_FROM = 30.0
"""The ratio of the largest to the smallest value from which a logarithmic axis shows more."""


@dataclass(frozen=True)
class Scale:
    """An axis: the data from `low` to `high` lie at the positions from `start` to `end`."""

    low: float
    high: float
    start: float
    end: float
    ticks: tuple[float, ...]
    logarithmic: bool = False

    def __call__(self, value: float) -> float:
        """The position of a value; one outside the axis is put at its end."""
        low, high, inside = self.low, self.high, min(max(value, self.low), self.high)
        if self.logarithmic:
            low, high, inside = math.log(low), math.log(high), math.log(inside)
        return self.start + (inside - low) / (high - low) * (self.end - self.start)

    def label(self, tick: float) -> str:
        """A tick as text, with as many digits as tell the ticks apart."""
        return tick_label(tick, self.ticks, logarithmic=self.logarithmic)


def linear_scale(
    values: Iterable[float],
    start: float,
    end: float,
    *,
    count: int = 4,
    whole: bool = True,
    least_step: float = 0.0,
) -> Scale:
    """A linear axis over the values.

    Args:
        values: finite numbers, at least one.
        start: the position of the lower end.
        end: the position of the upper end.
        count: about how many steps between ticks there are room for.
        whole: whether the axis ends on ticks, or where the values end.
        least_step: the smallest step between ticks: 1 for what is counted.
    """
    numbers = list(values)
    low, high = min(numbers), max(numbers)
    if low == high:
        margin = abs(low) * 0.1 or 1.0
        low, high = low - margin, high + margin
    step = max(least_step, tick_step(high - low, count))
    if whole:
        low, high = math.floor(low / step + 1e-9) * step, math.ceil(high / step - 1e-9) * step
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    ticks = tuple(round(index * step, 12) for index in range(first, last + 1))
    return Scale(low, high, start, end, ticks)


def value_scale(values: Iterable[float], start: float, end: float, *, count: int = 4) -> Scale:
    """An axis for a loss: logarithmic where it falls by orders of magnitude, else linear."""
    numbers = list(values)
    low, high = min(numbers), max(numbers)
    if low > 0 and high / low >= _LOG_FROM:
        return _logarithmic_scale(low, high, start, end)
    if 0 <= low < 0.5 * high:
        low = 0.0
    return linear_scale((low, high), start, end, count=count)


def tick_step(span: float, count: int) -> float:
    """The step of 1, 2 or 5 times a power of ten that divides the span into about `count`."""
    raw = span / max(count, 1)
    power = 10.0 ** math.floor(math.log10(raw))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= raw * (1 - 1e-9))


def tick_label(tick: float, ticks: tuple[float, ...], *, logarithmic: bool = False) -> str:
    """A tick as text; thousands as `k` where all ticks are multiples of them."""
    largest = max((abs(other) for other in ticks), default=0.0)
    if not logarithmic and largest >= 1e6:
        text = f"{tick / 1e6:g}M" if tick else "0"
    elif not logarithmic and largest >= 1e4:
        text = f"{tick / 1e3:g}k" if tick else "0"
    elif tick and abs(tick) < 1e-4:
        text = f"{tick:.0e}"
    else:
        gaps = [b - a for a, b in pairwise(ticks)]
        step = abs(tick) if logarithmic or not gaps else min(gaps)
        digits = max(0, -math.floor(math.log10(step) + 1e-9)) if step else 0
        text = f"{tick:,.{digits}f}"
    return text.replace("-", MINUS, 1) if text.startswith("-") else text


def _logarithmic_scale(low: float, high: float, start: float, end: float) -> Scale:
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    factors = (1, 2, 5) if last - first <= 2 else (1, 3) if last - first <= 3 else (1,)
    every = max(1, math.ceil((last - first) / 5))
    candidates = [
        factor * 10.0**power for power in range(first, last + 1, every) for factor in factors
    ]
    below = [tick for tick in candidates if tick <= low * 1.0001]
    above = [tick for tick in candidates if tick >= high * 0.9999]
    bottom, top = max(below, default=low), min(above, default=high)
    ticks = tuple(tick for tick in candidates if bottom <= tick <= top)
    return Scale(bottom, top, start, end, ticks, logarithmic=True)
