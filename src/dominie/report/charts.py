"""Charts as inline SVG: lines over steps, and intervals on a strip.

Colours, fonts and dashes are classes of the page's style sheet, so that a chart follows the theme
and prints. Every chart carries a title and a description for those who hear it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING

from markupsafe import Markup, escape

from dominie.report.formatting import Scale, figure, linear_scale, value_scale

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

Point = tuple[float, float]

_WIDTH, _HEIGHT = 320.0, 184.0
_LEFT, _RIGHT, _TOP, _BOTTOM = 40.0, 12.0, 10.0, 30.0
_SMOOTH_FROM = 40


@dataclass(frozen=True)
class Series:
    """A line of a chart: its name, its points by step (gaps where not finite), its style."""

    label: str
    points: Sequence[Point]
    style: str

    @property
    def drawable(self) -> list[Point]:
        """The points that have a place on paper."""
        return [point for point in self.points if all(map(math.isfinite, point))]

    @property
    def last(self) -> float | None:
        """The last finite value."""
        finite = self.drawable
        return finite[-1][1] if finite else None


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


def line_chart(
    title: str, series: Sequence[Series], *, points: int = 240, spanned: Sequence[float] = ()
) -> Markup | None:
    """Lines over steps on one axis of values.

    The axes stand in `data-x` and `data-y` (low, high, start, end, and `log`), and each line has
    its number in `data-line`: the page's script reads values off the paths.

    Args:
        title: what is drawn, for screen readers.
        series: the lines; those without a finite value are left out.
        points: how many points of a line are kept at most.
        spanned: further values that the axis has room for.

    Returns:
        The chart, or None where there is nothing to draw.
    """
    shown = [line for line in series if line.drawable]
    if not shown:
        return None
    finite = [point for line in shown for point in line.drawable]
    right, bottom = _WIDTH - _RIGHT, _HEIGHT - _BOTTOM
    steps = linear_scale((0.0, *(x for x, _ in finite)), _LEFT, right, whole=False, least_step=1.0)
    values = value_scale((*(y for _, y in finite), *spanned), bottom, _TOP)
    axes = [
        *_value_axis(values, right),
        *_step_axis(steps, bottom),
        element("text", "step", x=right, y=_HEIGHT - 2, class_="unit", text_anchor="end"),
    ]
    if values.logarithmic:
        axes.append(element("text", "log scale", x=_LEFT, y=_HEIGHT - 2, class_="unit"))
    lines = [
        shape
        for number, line in enumerate(shown)
        for shape in _line(line, number, steps, values, points)
    ]
    description = "; ".join(
        f"{line.label} from {figure(line.drawable[0][1])} to {figure(line.last)}" for line in shown
    )
    return picture(
        _WIDTH,
        _HEIGHT,
        title,
        description,
        *axes,
        *lines,
        data_x=_ends(steps),
        data_y=_ends(values),
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


def _ends(axis: Scale) -> str:
    """An axis for the script: the data at its ends, where those lie, and whether it is log."""
    written = f"{axis.low:.9g} {axis.high:.9g} {axis.start:g} {axis.end:g}"
    return f"{written} log" if axis.logarithmic else written


def _rounded(value: object) -> object:
    return f"{value:.1f}".removesuffix(".0") if isinstance(value, float) else value


def _value_axis(values: Scale, right: float) -> Iterable[Markup]:
    for tick in values.ticks:
        y = values(tick)
        yield element("line", x1=_LEFT, x2=right, y1=y, y2=y, class_="grid")
        yield element("text", values.label(tick), x=_LEFT - 6, y=y + 3.5, text_anchor="end")


def _step_axis(steps: Scale, bottom: float) -> Iterable[Markup]:
    yield element("line", x1=steps.start, x2=steps.end, y1=bottom, y2=bottom, class_="axis")
    for tick in steps.ticks:
        x = steps(tick)
        yield element("line", x1=x, x2=x, y1=bottom, y2=bottom + 3, class_="axis")
        yield element("text", steps.label(tick), x=x, y=bottom + 14, text_anchor="middle")


def _line(line: Series, number: int, steps: Scale, values: Scale, points: int) -> Iterable[Markup]:
    style = f"series {line.style}"
    if len(line.drawable) == 1:
        ((x, y),) = line.drawable
        yield element("circle", cx=steps(x), cy=values(y), r=2.5, class_=f"{style} single")
        return
    shown = line.points
    if len(line.drawable) >= _SMOOTH_FROM:
        logged = _path(_thinned(shown, points), steps, values)
        yield element("path", d=logged, class_=f"{style} raw")
        shown = _smoothed(shown)
    path = _path(_thinned(shown, points), steps, values)
    yield element("path", d=path, class_=style, data_line=number)


def _path(points: Sequence[Point], steps: Scale, values: Scale) -> str:
    """The path through the points, lifted where one is not finite."""
    written, lifted = [], True
    for x, y in points:
        if not math.isfinite(y):
            lifted = True
            continue
        written.append(f"{'M' if lifted else 'L'}{steps(x):.1f} {values(y):.1f}")
        lifted = False
    return "".join(written)


def _thinned(points: Sequence[Point], most: int) -> Sequence[Point]:
    """At most `most` of the points: the lowest and highest of each stretch, ends and gaps kept."""
    if len(points) <= most:
        return points
    stretch = math.ceil(2 * len(points) / most)
    kept: list[Point] = [points[0]]
    for start in range(0, len(points), stretch):
        part = points[start : start + stretch]
        finite = [point for point in part if math.isfinite(point[1])]
        gap = next((point for point in part if not math.isfinite(point[1])), None)
        chosen = {min(finite, key=_value), max(finite, key=_value)} if finite else set()
        kept += sorted(chosen | ({gap} if gap else set()))
    return [*kept, points[-1]]


def _smoothed(points: Sequence[Point]) -> list[Point]:
    """The mean over a window of a twentieth of the line, centred, gaps kept."""
    reach = max(1, len(points) // 40)
    finite = [y if math.isfinite(y) else 0.0 for _, y in points]
    sums = [0.0, *accumulate(finite)]
    counts = [0, *accumulate(math.isfinite(y) for _, y in points)]
    smooth = []
    for index, (x, y) in enumerate(points):
        low, high = max(0, index - reach), min(len(points), index + reach + 1)
        mean = (sums[high] - sums[low]) / max(1, counts[high] - counts[low])
        smooth.append((x, mean if math.isfinite(y) else math.nan))
    return smooth


def _value(point: Point) -> float:
    return point[1]
