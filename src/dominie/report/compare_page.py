"""A comparison of runs in the terminal and as one self-contained HTML page."""

from __future__ import annotations

from datetime import UTC, datetime
from importlib import resources
from typing import TYPE_CHECKING

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from dominie import __version__
from dominie.report.compare import front
from dominie.report.formatting import percent, signed_points
from dominie.report.scatter import Mark, plane_chart

if TYPE_CHECKING:
    from pathlib import Path

    from rich.console import RenderableType

    from dominie.report.compare import Comparison, Estimate, Point

_NOTE = "± 95 % interval"


def comparison_table(comparison: Comparison) -> RenderableType:
    """The models of a comparison, best on the second task first, to be printed by rich."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(box=SIMPLE_HEAD, pad_edge=False, show_edge=False)
    table.add_column("")
    table.add_column("model", no_wrap=True)
    for heading in _headings(comparison):
        table.add_column(heading, justify="right")
    for point in _ordered(comparison):
        mark = "●" if point.on_front else ""
        table.add_row(mark, point.name, *_cells(comparison, point))
    table.caption = f"{_note(comparison)} · ● on the Pareto front"
    return table


def write_comparison(comparison: Comparison, path: Path) -> None:
    """The comparison as a page that needs no other file and no network."""
    page = _page(comparison)
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f".{path.name}")
    scratch.write_text(page, encoding="utf-8", errors="replace")
    scratch.replace(path)


def _page(comparison: Comparison) -> str:
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    now = datetime.now(UTC)
    return environment.from_string(_shipped("comparison.html.j2")).render(
        style=Markup(_shipped("page.css")),
        tasks=comparison.tasks,
        plane=_plane(comparison),
        headings=_headings(comparison),
        rows=[(point, _cells(comparison, point)) for point in _ordered(comparison)],
        note=f"{_note(comparison)} · coloured: on the Pareto front, whose edge is dashed",
        notes=comparison.notes,
        version=__version__,
        made=f"{now.day} {now:%B %Y, %H:%M} UTC",
    )


def _plane(comparison: Comparison) -> Markup:
    marks = [
        Mark(p.name, p.x.mean, p.y.mean, p.x.ends, p.y.ends, chosen=p.on_front)
        for p in comparison.points
    ]
    on_front = [point.name for point in front(comparison.points)]
    return plane_chart(*comparison.tasks, marks, [], front=on_front)


def _headings(comparison: Comparison) -> list[str]:
    scores = [f"{task} %" for task in comparison.tasks]
    differences = [f"Δ {task}" for task in comparison.tasks] if comparison.against else []
    return [*scores, *differences, "runs"]


def _cells(comparison: Comparison, point: Point) -> list[str]:
    cells = [_score(point.x), _score(point.y)]
    if comparison.against:
        cells += [_difference(each) for each in point.differences or (None, None)]
    return [*cells, str(point.runs)]


def _ordered(comparison: Comparison) -> list[Point]:
    return sorted(comparison.points, key=lambda point: -point.y.mean)


def _note(comparison: Comparison) -> str:
    if comparison.against is None:
        return _NOTE
    return (
        f"{_NOTE} · Δ to {comparison.against}, in points, run by run; *: the interval leaves 0 out"
    )


def _score(found: Estimate) -> str:
    return percent(found.mean) + ("" if found.half is None else f" ±{percent(found.half)}")


def _difference(found: Estimate | None) -> str:
    if found is None:
        return "–"
    half = "" if found.half is None else f" ±{percent(found.half)}"
    return f"{signed_points(found.mean)}{half}{'*' if found.sure else ''}"


def _shipped(name: str) -> str:
    return (resources.files("dominie.report") / "templates" / name).read_text(encoding="utf-8")
