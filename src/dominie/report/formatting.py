"""Numbers as people read them, rich text, and the axes of charts."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

THIN = "\N{NARROW NO-BREAK SPACE}"
DASH = "\N{EN DASH}"
MINUS = "\N{MINUS SIGN}"


def percent(fraction: float | None, digits: int = 1) -> str:
    """A fraction in percent, without the sign: 0.769 is `76.9`."""
    return DASH if fraction is None else _sign(f"{100 * fraction:.{digits}f}")


def span(ends: tuple[float, float], *, rated: bool = False) -> str:
    """An interval of fractions in percent, `97.2–99.4`, or of ratings, `6.15–7.05`."""
    written = rating if rated else percent
    return f"{written(ends[0])}{DASH}{written(ends[1])}"


def rating(fraction: float) -> str:
    """A judge's rating from 1 to 10, which is kept as a fraction: 0.762 is `7.62`."""
    return f"{10 * fraction:.2f}"


def worth(fraction: float, rated: bool) -> str:
    """A score as it is read: in percent with its sign, or a rating from 1 to 10."""
    return rating(fraction) if rated else f"{percent(fraction)}{THIN}%"


def points(fraction: float, *, rated: bool = False) -> str:
    """The size of a difference of two fractions in points: of 100 (whole ones from ten on).

    Differences of ratings are in points of 10, as the ratings are.
    """
    if rated:
        return f"{abs(10 * fraction):.2f}"
    size = abs(100 * fraction)
    return f"{size:.0f}" if size >= 9.95 else f"{size:.1f}"


def signed_points(fraction: float, *, rated: bool = False) -> str:
    """The same with its sign: `+41.0`, of ratings `+0.35`."""
    return _sign(f"{10 * fraction:+.2f}" if rated else f"{100 * fraction:+.1f}")


def count(number: float | None) -> str:
    """A whole number with its thousands apart: `12,345`."""
    return DASH if number is None or not math.isfinite(number) else _sign(f"{number:,.0f}")


def size(number: float | None) -> str:
    """A large number in three digits: `1.06M`, `7.24B`."""
    if number is None or not math.isfinite(number):
        return DASH
    for bound, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(number) >= bound:
            return f"{number / bound:.3g}{unit}"
    return count(number)


def duration(seconds: float | None) -> str:
    """A length of time in its two largest units: `59 s`, `3 min 20 s`, `2 h 05 min`."""
    if seconds is None or not math.isfinite(seconds) or seconds < 0:
        return DASH
    whole = round(seconds)
    hours, minutes, rest = whole // 3600, whole // 60 % 60, whole % 60
    if hours >= 48:
        return f"{hours // 24}{THIN}d {hours % 24}{THIN}h"
    if hours:
        return f"{hours}{THIN}h {minutes:02d}{THIN}min"
    if minutes:
        return f"{minutes}{THIN}min {rest:02d}{THIN}s"
    return f"{whole}{THIN}s" if seconds >= 9.5 else f"{seconds:.1f}{THIN}s"


def figure(value: float | None) -> str:
    """A measured quantity in three significant digits: `0.0763`, `2.31`, `1.2e-05`."""
    if value is None or not math.isfinite(value):
        return DASH
    if value == 0 or 1e-3 <= abs(value) < 1e4:
        digits = 0 if value == 0 else max(0, 2 - math.floor(math.log10(abs(value))))
        return _sign(f"{value:.{digits}f}")
    return _sign(f"{value:.1e}")


def shortened(text: str, length: int) -> str:
    """A text no longer than `length`, its middle left out: names differ at both ends."""
    if len(text) <= length:
        return text
    head = (length - 1) // 2
    return f"{text[:head]}…{text[len(text) - (length - 1 - head) :]}"


def listed(words: list[str]) -> str:
    """Words as a list in a sentence: `a, b and c`."""
    return " and ".join(part for part in (", ".join(words[:-1]), words[-1]) if part)


def _sign(number: str) -> str:
    """The number with a minus sign of the width of a plus; a rounded zero loses its sign."""
    if number.startswith("-") and not number.strip("-0.,"):
        return number[1:]
    return number.replace("-", MINUS, 1) if number.startswith("-") else number


@dataclass(frozen=True)
class Part:
    """A piece of a sentence: words, or the name of a model or a task."""

    text: str
    kind: Literal["text", "model", "task"] = "text"


Sentence = tuple[Part, ...]


def plain(sentence: Sentence) -> str:
    """A sentence as text for a terminal."""
    return "".join(part.text for part in sentence)


def joined(items: Sequence[Sentence]) -> Sentence:
    """Pieces of a sentence as a list in it: `a, b and c`."""
    parts: list[Part] = []
    for index, item in enumerate(items):
        if index:
            parts.append(Part(" and " if index == len(items) - 1 else ", "))
        parts += item
    return tuple(parts)


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
