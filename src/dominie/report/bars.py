"""Horizontal bars with intervals, and a radar of categories."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dominie.report.charts import element, picture
from dominie.report.formatting import linear_scale, rating, shortened

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from markupsafe import Markup

    from dominie.report.formatting import Scale

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


_WIDTH_radar, _HEIGHT, _REACH = 440.0, 360.0, 128.0
_RINGS = (0.2, 0.4, 0.6, 0.8, 1.0)
_LEAST = 3  # categories of which a polygon can be made


@dataclass(frozen=True)
class Spokes:
    """A model's scores from 0 to 1 by category, and the style it is drawn in."""

    label: str
    values: Mapping[str, float]
    style: str
    chosen: bool = False


def radar_chart(title: str, categories: Sequence[str], models: Sequence[Spokes]) -> Markup | None:
    """Models as polygons over categories; None where there are fewer than three.

    A model that lacks a category has a gap there: its line stops on both sides.
    """
    if len(categories) < _LEAST or not models:
        return None
    description = "; ".join(
        f"{model.label}: "
        + ", ".join(f"{name} {rating(value)}" for name, value in model.values.items())
        for model in models
    )
    return picture(
        _WIDTH_radar,
        _HEIGHT,
        title,
        description,
        *_web(categories),
        *(shape for model in models for shape in _polygon(model, categories)),
        *_labels(len(categories)),
        style="radar",
    )


def _web(categories: Sequence[str]) -> Iterable[Markup]:
    count = len(categories)
    for ring in _RINGS:
        corners = " ".join(_written(_place(i, count, ring)) for i in range(count))
        yield element("polygon", points=corners, class_="ring")
    for i, category in enumerate(categories):
        (x0, y0), (x1, y1) = _place(i, count, 0.0), _place(i, count, 1.0)
        yield element("line", x1=x0, y1=y0, x2=x1, y2=y1, class_="grid")
        x, y = _place(i, count, 1.12)
        lean = math.cos(_angle(i, count))
        anchor = "middle" if abs(lean) < 0.2 else "start" if lean > 0 else "end"
        drop = 4.0 + 5.0 * math.sin(_angle(i, count))
        name = shortened(category, 22)
        yield element("text", name, x=x, y=y + drop, text_anchor=anchor, class_="spoke")


def _labels(count: int) -> Iterable[Markup]:
    """What the rings stand for, between two spokes, where few lines cross."""
    for ring in _RINGS:
        far = _REACH * ring * math.cos(math.pi / count)
        angle = _angle(0, count) + math.pi / count
        x, y = _WIDTH_radar / 2 + far * math.cos(angle), _HEIGHT / 2 + far * math.sin(angle)
        yield element("text", f"{10 * ring:g}", x=x, y=y + 3, text_anchor="middle", class_="unit")


def _polygon(model: Spokes, categories: Sequence[str]) -> Iterable[Markup]:
    count = len(categories)
    places = [
        _place(i, count, model.values[name]) if name in model.values else None
        for i, name in enumerate(categories)
    ]
    known = [place for place in places if place is not None]
    if len(known) == count:
        corners = " ".join(map(_written, known))
        yield element(
            "polygon",
            points=corners,
            class_=f"series {'area ' if model.chosen else ''}{model.style}",
        )
    else:
        for i, place in enumerate(places):
            after = places[(i + 1) % count]
            if place and after:
                line = f"{_written(place)} {_written(after)}"
                yield element("polyline", points=line, class_=f"series {model.style}")
    for name, place in zip(categories, places, strict=True):
        if place is not None:
            told = element("title", f"{model.label}, {name}: {rating(model.values[name])}")
            yield element(
                "circle", told, cx=place[0], cy=place[1], r=2.6, class_=f"corner {model.style}"
            )


def _angle(index: int, count: int) -> float:
    """The first spoke points upwards, the others follow clockwise."""
    return 2.0 * math.pi * index / count - math.pi / 2.0


def _place(index: int, count: int, value: float) -> tuple[float, float]:
    angle, far = _angle(index, count), _REACH * min(max(value, 0.0), 1.15)
    return _WIDTH_radar / 2 + far * math.cos(angle), _HEIGHT / 2 + far * math.sin(angle)


def _written(place: tuple[float, float]) -> str:
    return f"{place[0]:.1f},{place[1]:.1f}"
