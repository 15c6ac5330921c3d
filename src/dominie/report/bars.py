"""Horizontal bars from 0 to a whole, with intervals."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from dominie.report.charts import element, picture
from dominie.report.formats import shortened
from dominie.report.scales import linear_scale

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from markupsafe import Markup

    from dominie.report.scales import Scale

_WIDTH, _LEFT, _RIGHT, _TOP, _BOTTOM = 470.0, 134.0, 52.0, 8.0, 26.0
_BAR, _GAP = 12.0, 9.0


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
        half: whether a line marks the middle, where two sides are even.
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
