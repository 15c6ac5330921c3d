"""The scatter of two tasks: each model with its intervals, and arrows along the training."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

from markupsafe import Markup

from dominie.report.charts import Scale, element, linear_scale, picture
from dominie.report.formatting import figure, shortened

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

_WIDTH, _HEIGHT = 640.0, 470.0
_LEFT, _RIGHT, _TOP, _BOTTOM = 58.0, 26.0, 20.0, 52.0
_CHARACTER, _LINE = 7.3, 16.0
_CLEAR = 9.0


@dataclass(frozen=True)
class Unit:
    """What an axis counts in: so many make 1, and no figure is above `most`."""

    name: str
    whole: float = 1.0
    most: float = 1.0

    def text(self, value: float) -> str:
        """A figure with its unit."""
        return f"{figure(value) if self.most > 1 else f'{self.whole * value:.1f}'} {self.name}"


PERCENT, RATING = Unit("%", 100.0), Unit("of 10", 10.0)
NATS = Unit("nats", most=math.inf)


@dataclass(frozen=True)
class Mark:
    """A model in the scatter: its figures on both tasks, scores from 0 to 1, and intervals."""

    name: str
    x: float
    y: float
    x_ends: tuple[float, float] | None = None
    y_ends: tuple[float, float] | None = None
    trained: bool = True
    chosen: bool = False


@dataclass(frozen=True)
class _Box:
    left: float
    top: float
    right: float
    bottom: float

    def overlap(self, other: _Box) -> float:
        """The area that two boxes share."""
        wide = min(self.right, other.right) - max(self.left, other.left)
        high = min(self.bottom, other.bottom) - max(self.top, other.top)
        return max(0.0, wide) * max(0.0, high)


def scatter_chart(
    x_task: str,
    y_task: str,
    marks: Sequence[Mark],
    arrows: Sequence[tuple[str, str]],
    *,
    units: tuple[Unit, Unit] = (PERCENT, PERCENT),
    front: Sequence[str] = (),
) -> Markup:
    """Models as points with their 95 % intervals, arrows from each student to what it became.

    Args:
        x_task: the task across.
        y_task: the task upwards.
        marks: the models, at least one.
        arrows: pairs of names, from and to.
        units: of either axis.
        front: names to join by a line, from left to right.
    """
    across = [value for mark in marks for value in (mark.x, *(mark.x_ends or ()))]
    upwards = [value for mark in marks for value in (mark.y, *(mark.y_ends or ()))]
    x_scale = _axis(across, _LEFT, _WIDTH - _RIGHT, units[0])
    y_scale = _axis(upwards, _HEIGHT - _BOTTOM, _TOP, units[1])
    places = {mark.name: (x_scale(mark.x), y_scale(mark.y)) for mark in marks}
    description = "; ".join(
        f"{mark.name}: {units[0].text(mark.x)} on {x_task}, {units[1].text(mark.y)} on {y_task}"
        for mark in marks
    )
    return picture(
        _WIDTH,
        _HEIGHT,
        f"{y_task} against {x_task}",
        description,
        *_frame(x_task, y_task, x_scale, y_scale, units),
        *_front([places[name] for name in front]),
        *(_arrow(places[start], places[end]) for start, end in arrows),
        *(shape for mark in marks for shape in _whiskers(mark, x_scale, y_scale)),
        *(_dot(mark, places[mark.name], x_task, y_task, units) for mark in marks),
        *_labels(marks, places, x_scale, y_scale, arrows),
        style="scatter",
    )


def _axis(values: Sequence[float], start: float, end: float, unit: Unit) -> Scale:
    room = 0.06 * (max(values) - min(values)) or 0.05
    inside = (max(0.0, min(values) - room), min(unit.most, max(values) + room))
    return linear_scale(inside, start, end, count=6, whole=False)


def _frame(
    x_task: str, y_task: str, x_scale: Scale, y_scale: Scale, units: tuple[Unit, Unit]
) -> Iterable[Markup]:
    left, right, top, bottom = x_scale.start, x_scale.end, y_scale.end, y_scale.start
    for tick in x_scale.ticks:
        x, text = x_scale(tick), f"{units[0].whole * tick:g}"
        yield element("line", x1=x, x2=x, y1=top, y2=bottom, class_="grid")
        yield element("text", text, x=x, y=bottom + 18, text_anchor="middle")
    for tick in y_scale.ticks:
        y, text = y_scale(tick), f"{units[1].whole * tick:g}"
        yield element("line", x1=left, x2=right, y1=y, y2=y, class_="grid")
        yield element("text", text, x=left - 8, y=y + 4, text_anchor="end")
    yield element("line", x1=left, x2=right, y1=bottom, y2=bottom, class_="axis")
    yield element("line", x1=left, x2=left, y1=top, y2=bottom, class_="axis")
    across = f"{shortened(x_task, 40)}, {units[0].name} →"
    upwards = f"{shortened(y_task, 40)}, {units[1].name} →"
    yield element("text", across, x=right, y=bottom + 40, text_anchor="end", class_="name")
    turned = f"rotate(-90 {left - 42:g} {top:g})"
    yield element(
        "text",
        upwards,
        x=left - 42,
        y=top,
        transform=turned,
        text_anchor="end",
        class_="name",
    )


def _whiskers(mark: Mark, x_scale: Scale, y_scale: Scale) -> Iterable[Markup]:
    x, y, style = x_scale(mark.x), y_scale(mark.y), _style(mark, "whisker")
    if mark.x_ends:
        low, high = map(x_scale, mark.x_ends)
        yield element("line", x1=low, x2=high, y1=y, y2=y, class_=style)
    if mark.y_ends:
        low, high = map(y_scale, mark.y_ends)
        yield element("line", x1=x, x2=x, y1=low, y2=high, class_=style)


def _dot(
    mark: Mark, place: tuple[float, float], x_task: str, y_task: str, units: tuple[Unit, Unit]
) -> Markup:
    text = f"{mark.name}: {x_task} {units[0].text(mark.x)}, {y_task} {units[1].text(mark.y)}"
    style = _style(mark, "dot" if mark.trained else "dot given")
    title = element("title", text)
    return element("circle", title, cx=place[0], cy=place[1], r=5.5, class_=style)


def _front(places: list[tuple[float, float]]) -> Iterable[Markup]:
    """The edge of all that is matched on both tasks by one of these: stairs, no slope."""
    corners = places[:1]
    for (x, _), place in pairwise(places):
        corners += [(x, place[1]), place]
    if len(places) > 1:
        points = " ".join(f"{x:.1f},{y:.1f}" for x, y in corners)
        yield element("polyline", points=points, class_="front")


def _arrow(start: tuple[float, float], end: tuple[float, float]) -> Markup:
    """A slightly bent arrow that stops short of both points; nothing between points that touch."""
    if math.dist(start, end) < 3.5 * _CLEAR:
        return Markup("")
    control = _bend(start, end)
    first, last = _towards(start, control, _CLEAR), _towards(end, control, _CLEAR + 6)
    tip, angle = (
        _towards(end, control, _CLEAR),
        math.atan2(end[1] - control[1], end[0] - control[0]),
    )
    wings = [
        (tip[0] - 9 * math.cos(angle + turn), tip[1] - 9 * math.sin(angle + turn))
        for turn in (-0.4, 0.4)
    ]
    head = " ".join(f"{x:.1f},{y:.1f}" for x, y in (tip, *wings))
    path = f"M{first[0]:.1f} {first[1]:.1f}Q{control[0]:.1f} {control[1]:.1f} "
    return element(
        "g",
        element("path", d=f"{path}{last[0]:.1f} {last[1]:.1f}"),
        element("polygon", points=head),
        class_="arrow",
    )


def _labels(
    marks: Sequence[Mark],
    places: dict[str, tuple[float, float]],
    x_scale: Scale,
    y_scale: Scale,
    arrows: Sequence[tuple[str, str]],
) -> Iterable[Markup]:
    """Names beside their points, each at the place where it covers least of the drawing."""
    taken = [_around(place, 7.0) for place in places.values()]
    for mark in marks:
        x, y = places[mark.name]
        left, right = map(x_scale, mark.x_ends or (mark.x, mark.x))
        low, high = map(y_scale, mark.y_ends or (mark.y, mark.y))
        taken += [_Box(left, y - 2, right, y + 2), _Box(x - 2, high, x + 2, low)]
    for start, end in arrows:
        taken += _along(places[start], places[end])
    for mark in marks:
        x, y = places[mark.name]
        text = shortened(mark.name, 28)
        box, anchor = min(
            _candidates(x, y, _CHARACTER * len(text)),
            key=lambda candidate: _cost(candidate[0], taken),
        )
        taken.append(box)
        at = {"start": box.left, "middle": (box.left + box.right) / 2, "end": box.right}[anchor]
        style = _style(mark, "label")
        yield element("text", text, x=at, y=box.bottom - 4, text_anchor=anchor, class_=style)


def _candidates(x: float, y: float, wide: float) -> Iterable[tuple[_Box, str]]:
    """Boxes for a label around a point, the preferred ones first."""
    for away in (8.0, 16.0, 28.0):
        for dx, dy, anchor in (
            (away, -away, "start"),
            (-away, -away, "end"),
            (away, away, "start"),
            (-away, away, "end"),
            (away + 4, 0, "start"),
            (-away - 4, 0, "end"),
            (0, -away - 8, "middle"),
            (0, away + 8, "middle"),
        ):
            left = x + dx - {"start": 0.0, "middle": wide / 2, "end": wide}[anchor]
            yield _Box(left, y + dy - _LINE / 2, left + wide, y + dy + _LINE / 2), anchor


def _cost(box: _Box, taken: Sequence[_Box]) -> float:
    page = _Box(_LEFT - 4, 0.0, _WIDTH, _HEIGHT - _BOTTOM)
    area = (box.right - box.left) * (box.bottom - box.top)
    outside = area - box.overlap(page)
    return 20 * outside + sum(box.overlap(other) for other in taken)


def _along(start: tuple[float, float], end: tuple[float, float]) -> list[_Box]:
    """Small boxes along an arrow, so that labels keep off it."""
    (x1, y1), (mx, my), (x2, y2) = start, _bend(start, end), end
    boxes = []
    for index in range(1, 12):
        t = index / 12
        x = (1 - t) ** 2 * x1 + 2 * t * (1 - t) * mx + t**2 * x2
        y = (1 - t) ** 2 * y1 + 2 * t * (1 - t) * my + t**2 * y2
        boxes.append(_around((x, y), 4.0))
    return boxes


def _bend(start: tuple[float, float], end: tuple[float, float]) -> tuple[float, float]:
    """The control point that bends an arrow to its left."""
    (x1, y1), (x2, y2) = start, end
    length = math.dist(start, end) or 1.0
    aside = min(80.0, 0.18 * length) / length
    return (x1 + x2) / 2 + aside * (y2 - y1), (y1 + y2) / 2 - aside * (x2 - x1)


def _around(place: tuple[float, float], reach: float) -> _Box:
    return _Box(place[0] - reach, place[1] - reach, place[0] + reach, place[1] + reach)


def _towards(
    start: tuple[float, float], end: tuple[float, float], far: float
) -> tuple[float, float]:
    part = far / (math.dist(start, end) or 1.0)
    return start[0] + part * (end[0] - start[0]), start[1] + part * (end[1] - start[1])


def _style(mark: Mark, style: str) -> str:
    return f"{style} chosen" if mark.chosen else style


def pareto_front(places: Mapping[str, tuple[float, float]]) -> list[str]:
    """The names on the front, from left to right.

    Args:
        places: two scores of each name, both better when higher. Names in one place share it.
    """
    kept = [
        name
        for name, place in places.items()
        if not any(_beats(other, place) for other in places.values())
    ]
    return sorted(kept, key=lambda name: (places[name][0], -places[name][1]))


def _beats(one: tuple[float, float], other: tuple[float, float]) -> bool:
    """Whether one is at least as good on both scores and better on one."""
    return one[0] >= other[0] and one[1] >= other[1] and one != other
