"""The curves of a stage over its steps."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import TYPE_CHECKING

from dominie.report.charts import Scale, element, linear_scale, picture, swatch, value_scale
from dominie.report.formatting import figure

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from markupsafe import Markup

    from dominie.core.run_records import Stage

Point = tuple[float, float]

_WIDTH, _HEIGHT = 320.0, 184.0
_LEFT, _RIGHT, _TOP, _BOTTOM = 40.0, 12.0, 10.0, 30.0
_SMOOTH_FROM = 40
_COLOURS = 6


@dataclass(frozen=True)
class Series:
    """A line of a chart: its name, its points by step (gaps if not finite), its style."""

    label: str
    points: Sequence[Point]
    style: str

    @cached_property
    def drawable(self) -> list[Point]:
        """The points that have a place on paper."""
        return [point for point in self.points if all(map(math.isfinite, point))]

    @property
    def last(self) -> float | None:
        """The last finite value."""
        finite = self.drawable
        return finite[-1][1] if finite else None


@dataclass(frozen=True)
class Key:
    """A line of a legend: its swatch, its name and its last value."""

    swatch: Markup
    label: str
    last: str


@dataclass(frozen=True)
class Figure:
    """A chart with its caption and legend."""

    title: str
    chart: Markup
    keys: tuple[Key, ...]


@dataclass(frozen=True)
class StageCurves:
    """The figures of one stage."""

    stage: Stage
    figures: tuple[Figure, ...]


def run_curves(
    stages: Sequence[Stage], sources: Sequence[str], points: int
) -> tuple[StageCurves, ...]:
    """The figures of every stage that logged something.

    Held-out losses and divergences of all stages share an axis, so that a height means the same
    wherever it is seen. Training losses do not: what is minimised differs from stage to stage.

    Args:
        stages: the stages of a run.
        sources: the sources of the whole run; colours are given in this order, to those first
            that are held out, which are seen most.
        points: how many points of a line are kept at most.
    """
    seen = {source for stage in stages for line in stage.evaluations for source in line.sources}
    ordered = sorted(sources, key=lambda source: source not in seen)
    style = {source: f"c{index % _COLOURS}" for index, source in enumerate(ordered)}
    measured = [_measured(stage, style) for stage in stages]
    forgotten = [
        _by_source(stage, lambda found: found.get("forgetting"), style) for stage in stages
    ]
    distances = _values(forgotten)
    losses = _values(held_out for held_out, _, _ in measured)
    divergences = _values(divergence for _, divergence, _ in measured)
    curves = []
    for stage, (held_out, divergence, title), moved in zip(
        stages, measured, forgotten, strict=True
    ):
        figures = (
            _figure("Training loss", _training_losses(stage), points),
            _figure("Held-out loss by source", held_out, points, losses),
            _figure(title, divergence, points, divergences),
            _figure("Held-out KL from the start", moved, points, distances),
        )
        curves.append(StageCurves(stage, tuple(figure for figure in figures if figure)))
    return tuple(each for each in curves if each.figures)


def _measured(stage: Stage, style: Mapping[str, str]) -> tuple[list[Series], list[Series], str]:
    """Held-out losses and divergences by source, and what the divergences are."""
    held_out = _by_source(stage, _held_out_loss, style)
    divergence = _by_source(stage, lambda values: values.get("divergence"), style)
    if divergence:
        return held_out, divergence, "Held-out KL to the teacher"
    return held_out, _by_source_in_training(stage, style), "KL to the teacher, training rows"


def _values(figures: Iterable[Sequence[Series]]) -> list[float]:
    """Every finite value of many figures."""
    return [y for series in figures for line in series for _, y in line.drawable]


def _training_losses(stage: Stage) -> list[Series]:
    """The loss, and its terms if there are several."""
    total = [(line.step, line.values["loss"]) for line in stage.train if "loss" in line.values]
    names = dict.fromkeys(term for line in stage.train for term in line.terms)
    terms = [
        Series(
            term.replace("_", " "),
            [(line.step, line.terms[term]) for line in stage.train if term in line.terms],
            f"c{(index + 2) % _COLOURS}",
        )
        for index, term in enumerate(names)
    ]
    label = "loss" if len(terms) != 1 else f"loss ({terms[0].label})"
    return [Series(label, total, "total"), *(terms if len(terms) > 1 else ())]


def _held_out_loss(values: Mapping[str, float]) -> float | None:
    """The next-token loss, which compares across stages, else the stage's own objective."""
    return values.get("next_token", values.get("loss"))


def _by_source(
    stage: Stage,
    measure: Callable[[Mapping[str, float]], float | None],
    style: Mapping[str, str],
) -> list[Series]:
    points: dict[str, list[tuple[float, float]]] = {}
    for line in stage.evaluations:
        for source, values in line.sources.items():
            value = measure(values)
            if value is not None:
                points.setdefault(source, []).append((line.step, value))
    return _series(points, style)


def _by_source_in_training(stage: Stage, style: Mapping[str, str]) -> list[Series]:
    points: dict[str, list[tuple[float, float]]] = {}
    for line in stage.train:
        for source, values in line.sources.items():
            if "divergence" in values:
                points.setdefault(source, []).append((line.step, values["divergence"]))
    return _series(points, style)


def _series(
    points: Mapping[str, Sequence[tuple[float, float]]], style: Mapping[str, str]
) -> list[Series]:
    """One line a source, in the order of the run and not of the stage."""
    ordered = [
        *(source for source in style if source in points),
        *sorted(points.keys() - style.keys()),
    ]
    return [Series(source, points[source], style.get(source, "c0")) for source in ordered]


def _figure(
    title: str, series: Sequence[Series], points: int, spanned: Sequence[float] = ()
) -> Figure | None:
    chart = line_chart(title, series, points=points, spanned=spanned)
    if chart is None:
        return None
    keys = tuple(
        Key(swatch(line.style), line.label, figure(line.last)) for line in series if line.drawable
    )
    return Figure(title, chart, keys)


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
        The chart, or None if there is nothing to draw.
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


def _ends(axis: Scale) -> str:
    """An axis for the script: the data at its ends, their positions, and whether it is log."""
    written = f"{axis.low:.9g} {axis.high:.9g} {axis.start:g} {axis.end:g}"
    return f"{written} log" if axis.logarithmic else written


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
    """The path through the points, lifted if one is not finite."""
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
