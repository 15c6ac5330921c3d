"""Drawings as inline SVG: elements, axes, bars with intervals.

Colours, fonts and dashes are classes of the page's style sheet, so that a chart follows the theme
and prints. Every chart has a title and a description for screen readers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

from markupsafe import Markup, escape

from dominie.report.formatting import MINUS, shortened

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

_WIDTH, _LEFT, _RIGHT, _TOP, _BOTTOM = 470.0, 134.0, 52.0, 8.0, 26.0  # of a bar chart
_BAR, _GAP = 12.0, 9.0
_LOG_FROM = 30.0
"""The ratio of the largest to the smallest value from which a logarithmic axis shows more."""


def element(name: str, *children: str, **attributes: object) -> Markup:
    """An element with escaped attributes and children; `_` in an attribute's name is a dash."""
    written = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{escape(_rounded(value))}"'
        for key, value in attributes.items()
        if value is not None
    )
    inside = Markup("").join(children)
    if not inside:
        return Markup(f"<{name}{written}/>")
    return Markup(f"<{name}{written}>{inside}</{name}>")


def picture(
    width: float,
    height: float,
    title: str,
    description: str,
    *shapes: str,
    style: str = "chart",
    **attributes: object,
) -> Markup:
    """An SVG of that size in units of its own, named for screen readers."""
    return element(
        "svg",
        element("desc", description),
        *shapes,
        viewBox=f"0 0 {width:g} {height:g}",
        class_=style,
        role="img",
        aria_label=f"{title}. {description}" if description else title,
        **attributes,
    )


def interval_strip(score: float, ends: tuple[float, float] | None) -> Markup:
    """A score from 0 to 1 as a bar that ends in a stroke, in the band of its interval."""
    width, height = 120.0, 14.0
    place = linear_scale((0.0, 1.0), 4.0, width - 4.0)
    x = place(score)
    shapes = [
        element("rect", x=4, y=5, width=width - 8, height=4, class_="rail"),
        element("rect", x=4, y=5, width=x - 4, height=4, class_="reach"),
    ]
    if ends:
        low, high = map(place, ends)
        wide = max(high - low, 1.5)
        shapes.append(element("rect", x=low, y=2, width=wide, height=10, rx=1.5, class_="interval"))
    shapes.append(element("line", x1=x, x2=x, y1=1, y2=13, class_="mark"))
    return element(
        "svg",
        *shapes,
        viewBox=f"0 0 {width:g} {height:g}",
        class_="strip",
        aria_hidden="true",
    )


def swatch(style: str) -> Markup:
    """A short line in a series' style, for its legend."""
    line = element("line", x1=0, x2=22, y1=5, y2=5, class_=f"series {style}")
    return element("svg", line, viewBox="0 0 22 10", class_="swatch", aria_hidden="true")


def _rounded(value: object) -> object:
    return f"{value:.1f}".removesuffix(".0") if isinstance(value, float) else value


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
        """A tick as text, with as many digits as the ticks differ in."""
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
        whole: whether the axis ends on ticks, or at the last value.
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
    """An axis for a loss: logarithmic if it falls by orders of magnitude, else linear."""
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
    """A tick as text; thousands as `k` if all ticks are multiples of them."""
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


@dataclass(frozen=True)
class Bar:
    """One bar: its length from 0 to 1, what is written at its end, its interval, its style."""

    value: float
    text: str
    ends: tuple[float, float] | None = None
    style: str = "first"


@dataclass(frozen=True)
class BarGroup:
    """The bars of one name, below each other."""

    label: str
    bars: tuple[Bar, ...]
    style: str = ""


def bar_chart(
    title: str,
    groups: Sequence[BarGroup],
    *,
    ticks: Sequence[tuple[float, str]],
    half: bool = False,
) -> Markup:
    """Bars with their intervals, a name beside each group.

    Args:
        title: what is drawn, for screen readers.
        groups: at least one, the first on top.
        ticks: positions from 0 to 1 and what is written there.
        half: whether a line marks the middle, at which two sides are even.
    """
    scale = linear_scale((0.0, 1.0), _LEFT, _WIDTH - _RIGHT)
    height = _TOP + _BOTTOM + sum(_tall(group) for group in groups)
    shapes = [*_axis(scale, ticks, height - _BOTTOM, half)]
    y = _TOP
    for group in groups:
        shapes += _group(group, scale, y)
        y += _tall(group)
    description = "; ".join(
        f"{group.label}: {', '.join(bar.text for bar in group.bars)}" for group in groups
    )
    return picture(_WIDTH, height, title, description, *shapes, style="bars")


def _tall(group: BarGroup) -> float:
    return _BAR * len(group.bars) + _GAP


def _axis(
    scale: Scale, ticks: Sequence[tuple[float, str]], bottom: float, half: bool
) -> Iterable[Markup]:
    for at, text in ticks:
        x = scale(at)
        style = "axis even" if half and at == 0.5 else "grid"
        yield element("line", x1=x, x2=x, y1=_TOP - 4, y2=bottom, class_=style)
        yield element("text", text, x=x, y=bottom + 15, text_anchor="middle")


def _group(group: BarGroup, scale: Scale, top: float) -> Iterable[Markup]:
    middle = top + _BAR * len(group.bars) / 2 + 4
    name = shortened(group.label, 22)
    style = f"name {group.style}".strip()
    yield element("text", name, x=_LEFT - 10, y=middle, text_anchor="end", class_=style)
    for number, bar in enumerate(group.bars):
        y, x = top + number * _BAR, scale(bar.value)
        yield element(
            "rect",
            x=scale(0.0),
            y=y + 1,
            width=max(x - scale(0.0), 0.5),
            height=_BAR - 2,
            rx=1.5,
            class_=f"bar {bar.style} {group.style}".strip(),
        )
        end = x
        if bar.ends:
            low, high = map(scale, bar.ends)
            end, center = max(end, high), y + _BAR / 2
            yield element("line", x1=low, x2=high, y1=center, y2=center, class_="whisker")
            for cap in (low, high):
                yield element(
                    "line", x1=cap, x2=cap, y1=center - 3, y2=center + 3, class_="whisker"
                )
        yield element("text", bar.text, x=end + 6, y=y + _BAR - 2, class_="value")
