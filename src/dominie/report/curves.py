"""The curves of a stage: what was minimised, what was forgotten, how near the teachers it is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from dominie.report.charts import Series, line_chart, swatch
from dominie.report.formats import figure

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from markupsafe import Markup

    from dominie.report.records import Stage

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


def stage_curves(stage: Stage, sources: Sequence[str], points: int) -> StageCurves:
    """The figures that a stage's metrics allow, of loss, of loss by source, of KL by source.

    Args:
        stage: the stage.
        sources: the sources of the whole run, in whose order colours are given.
        points: how many points of a line are kept at most.
    """
    style = {source: f"c{index % _COLOURS}" for index, source in enumerate(sources)}
    held_out = _by_source(stage, _held_out_loss, style)
    divergence = _by_source(stage, lambda values: values.get("divergence"), style)
    measured = "Held-out KL to the teacher" if divergence else "KL to the teacher, training rows"
    divergence = divergence or _by_source_in_training(stage, style)
    figures = (
        _figure("Training loss", _training_losses(stage), points),
        _figure("Held-out loss by source", held_out, points),
        _figure(measured, divergence, points),
    )
    return StageCurves(stage, tuple(figure for figure in figures if figure))


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
    return [Series(source, points[source], style.get(source, "c0")) for source in points]


def _by_source_in_training(stage: Stage, style: Mapping[str, str]) -> list[Series]:
    points: dict[str, list[tuple[float, float]]] = {}
    for line in stage.train:
        for source, values in line.sources.items():
            if "divergence" in values:
                points.setdefault(source, []).append((line.step, values["divergence"]))
    return [Series(source, points[source], style.get(source, "c0")) for source in points]


def _figure(title: str, series: Sequence[Series], points: int) -> Figure | None:
    chart = line_chart(title, series, points=points)
    if chart is None:
        return None
    keys = tuple(Key(swatch(line.style), line.label, figure(line.last)) for line in series)
    return Figure(title, chart, keys)
