"""The curves of a stage over its steps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from dominie.report.charts import Series, line_chart, swatch
from dominie.report.formatting import figure

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from markupsafe import Markup

    from dominie.core.run_records import Stage

_COLOURS = 6


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
    losses = _values(held_out for held_out, _, _ in measured)
    divergences = _values(divergence for _, divergence, _ in measured)
    curves = []
    for stage, (held_out, divergence, title) in zip(stages, measured, strict=True):
        figures = (
            _figure("Training loss", _training_losses(stage), points),
            _figure("Held-out loss by source", held_out, points, losses),
            _figure(title, divergence, points, divergences),
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
    """The loss and, where there are several or another, its terms."""
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
