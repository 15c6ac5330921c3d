"""A run, and a comparison of runs, as one self-contained HTML page each."""

from __future__ import annotations

import base64
import functools
import hashlib
import uuid
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from dominie import __version__
from dominie.core.io import create
from dominie.core.run_records import read_run
from dominie.report import formatting as formats
from dominie.report.answers import Selection, judged_tasks, selection
from dominie.report.charts import interval_strip
from dominie.report.compare import front
from dominie.report.curves import run_curves
from dominie.report.forgetting import forgetting_planes, unit_of
from dominie.report.headline import Change, change, changes, findings
from dominie.report.scatter import Mark, pareto_front, scatter_chart
from dominie.report.tables import (
    baseline_changes,
    comparison_headings,
    comparison_note,
    comparison_rows,
    data_table,
    group_table,
    results_grid,
    sources_of,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from dominie.core.run_records import Run, Stage
    from dominie.report.compare import Comparison

SIZE_LIMIT = 1_000_000
"""Bytes that a report must stay below."""
_MOVED = 4
#: Rates without columns of their own, which would make the results wider than the page.
_RATES = {"invalid": "invalid", "cut": "cut off", "empty": "empty", "unanswered": "unanswered"}


@dataclass(frozen=True)
class _Detail:
    """How much of a run is drawn and quoted.

    Attributes:
        points: the points kept of a curve.
        samples: the prompts shown of a task.
        length: the characters shown of a text.
        families: whether the breakdown by family is shown.
    """

    points: int
    samples: int
    length: int
    families: bool = True


_DETAILS = (
    _Detail(points=240, samples=6, length=500),
    _Detail(points=120, samples=5, length=300),
    _Detail(points=60, samples=3, length=200),
    _Detail(points=24, samples=1, length=120, families=False),
)


def write_report(run: Path) -> Path:
    """Write `report.html` into a run folder, whatever there is of the run so far.

    Args:
        run: the run folder, `runs/NAME`.

    Returns:
        The path of the page. It needs no other file and no network, and is under a megabyte.

    Raises:
        InputError: the folder is missing, or is no run folder.
    """
    path = Path(run) / "report.html"
    _write(report_html(read_run(run)), path)
    return path


def report_html(run: Run) -> bytes:
    """The page in UTF-8, with less detail if a run is so large that it would grow too big."""
    page = b""
    for detail in _DETAILS:
        page = _rendered("page.html.j2", **_contents(run, detail))
        if len(page) < SIZE_LIMIT:
            break
    return page


def write_comparison(comparison: Comparison, path: Path) -> None:
    """Write a comparison of runs as a page that needs no other file and no network."""
    path.parent.mkdir(parents=True, exist_ok=True)
    marks = [
        Mark(p.name, p.x.mean, p.y.mean, p.x.ends, p.y.ends, chosen=p.on_front)
        for p in comparison.points
    ]
    on_front = [point.name for point in front(comparison.points)]
    page = _rendered(
        "comparison.html.j2",
        tasks=comparison.tasks,
        scatter=scatter_chart(*comparison.tasks, marks, [], front=on_front),
        headings=comparison_headings(comparison),
        rows=comparison_rows(comparison),
        note=f"{comparison_note(comparison)} · coloured: on the Pareto front, whose edge is dashed",
        notes=comparison.notes,
    )
    _write(page, path)


def _write(page: bytes, path: Path) -> None:
    """Replace a page atomically: a browser may have it open, another process may write it, too."""
    scratch = path.with_name(f".report-{uuid.uuid4().hex}")
    with create(scratch) as file:  # readable to whom the umask says
        file.write(page)
    scratch.replace(path)


def _rendered(template: str, **contents: Any) -> bytes:
    """A page from its template, with the style and the script that all pages share."""
    script = _shipped("page.js")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    now = datetime.now(UTC)
    page = (
        _environment()
        .get_template(template)
        .render(
            style=Markup(_shipped("page.css")),
            script=Markup(script),
            script_digest=digest,
            version=__version__,
            made=f"{now.day} {now:%B %Y, %H:%M} UTC",
            **contents,
        )
    )
    return page.encode("utf-8", errors="replace")


@functools.cache
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("dominie.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    numbers = (formats.percent, formats.count, formats.size, formats.duration, formats.file_size)
    filters = (*numbers, formats.shortened, formats.signed_points, formats.with_unit)
    environment.filters |= {each.__name__: each for each in filters}
    return environment


def _shipped(name: str) -> str:
    return (resources.files("dominie.report") / "templates" / name).read_text(encoding="utf-8")


def _contents(run: Run, detail: _Detail) -> Mapping[str, Any]:
    found = findings(run)
    stages = tuple(run.stages.values())
    sources = sources_of(stages)
    over_baseline = baseline_changes(run)
    samples = _samples(run, detail)
    families = [group_table(run, task) for task in run.tasks] if detail.families else []
    return {
        "run": run,
        "found": found,
        "movement": _movement(run, found.model),
        "grid": results_grid(run, without=_RATES),
        "rates": _rates(run),
        "rated": any(map(run.rated, run.tasks)),
        "strip": interval_strip,
        "scatter": _scatter(run, found.model),
        "scatter_tasks": _comparable_tasks(run)[:2],
        "planes": forgetting_planes(run, found.model),
        "steps_taken": _steps_taken(run, [model for model, _ in over_baseline]),
        "over_baseline": over_baseline,
        "judged": judged_tasks(run, found.model),
        "curves": run_curves(stages, sources, detail.points),
        "families": [table for table in families if table],
        "samples": samples,
        "shown_models": _shown_models(samples.values()),
        "stages": stages,
        "terms": {stage.name: _terms(stage) for stage in stages},
        "data": data_table(stages),
        "mixes": [s for s in stages if len(s.data) > 1 and all(map(_has_shares, s.data.values()))],
        "versions": _versions(stages),
        "totals": _totals(stages),
    }


def _rates(run: Run) -> dict[str, dict[str, str]]:
    """How many answers are no whole ones, of each model by task: below the score, in few words."""
    return {
        model: {
            task: ", ".join(
                f"{formats.percent(rate)} % {word}"
                for key, word in _RATES.items()
                if (rate := score.extras.get(key))
            )
            for task, score in scores.items()
        }
        for model, scores in run.results.items()
    }


def _comparable_tasks(run: Run) -> tuple[str, ...]:
    """The tasks in which models differ: of ability if any is solved at all, else of agreement."""
    abilities = run.ability_tasks
    if any(scores[t].score for scores in run.results.values() for t in abilities if t in scores):
        return abilities
    return tuple(task for task in run.tasks if task not in abilities)


def _scatter(run: Run, chosen: str | None) -> Markup | None:
    """The scatter of the first two tasks in which models differ, of models measured on both."""
    tasks = _comparable_tasks(run)
    if len(tasks) < 2:
        return None
    across, upwards = tasks[:2]
    marks = [
        Mark(
            model,
            scores[across].score,
            scores[upwards].score,
            scores[across].ends,
            scores[upwards].ends,
            trained=model in run.stages,
            chosen=model == chosen,
        )
        for model, scores in run.results.items()
        if across in scores and upwards in scores
    ]
    names = {mark.name for mark in marks}
    arrows = [
        (parent, model)
        for model in run.results
        if (parent := run.parent(model)) and {parent, model} <= names
    ]
    units = (unit_of(run, across), unit_of(run, upwards))
    front = pareto_front({mark.name: (mark.x, mark.y) for mark in marks})
    if not marks:
        return None
    return scatter_chart(across, upwards, marks, arrows, units=units, front=front)


def _movement(run: Run, chosen: str | None) -> Sequence[Change]:
    """The changes of the headline's model on the first tasks, from its parent."""
    parent = run.parent(chosen) if chosen else None
    if not chosen or not parent:
        return []
    mine, theirs = run.results[chosen], run.results[parent]
    shared = [task for task in _comparable_tasks(run) if task in mine and task in theirs]
    return [change(run, task, chosen, parent) for task in shared[:_MOVED]]


def _steps_taken(
    run: Run, over_baseline: Sequence[str]
) -> list[tuple[str, str, dict[str, Change]]]:
    """Of each model trained from another: both names, and the change on every task.

    Steps from the baseline have a table of their own.
    """
    return [
        (parent, model, {change.task: change for change in changes(run, model, parent)})
        for model in run.results
        if (parent := run.parent(model)) and not (parent == run.baseline and model in over_baseline)
    ]


def _samples(run: Run, detail: _Detail) -> dict[str, Selection]:
    return {
        task: selection(by_model, detail.samples, detail.length)
        for task, by_model in run.samples.items()
    }


def _shown_models(samples: Iterable[Selection]) -> dict[str, int]:
    """The models whose answers are shown, each with a number to be hidden by."""
    names = dict.fromkeys(
        model for task in samples for each in task.shown for model in each.answers
    )
    return {name: number for number, name in enumerate(names)}


def _has_shares(counts: Mapping[str, float]) -> bool:
    return {"share", "token_share", "loss_share"} <= counts.keys()


def _terms(stage: Stage) -> tuple[str, ...]:
    """The terms of a stage's loss, by what it logged."""
    names = dict.fromkeys(term for line in stage.train for term in line.terms)
    return tuple(term.replace("_", " ") for term in names)


def _versions(stages: Sequence[Stage]) -> dict[str, str]:
    """Every version that a stage ran under; several if a run was continued under another."""
    found: dict[str, list[str]] = {}
    for stage in stages:
        for package, version in stage.versions.items():
            if version not in found.setdefault(package, []):
                found[package].append(version)
    return {package: ", ".join(versions) for package, versions in found.items()}


def _totals(stages: Sequence[Stage]) -> dict[str, float | None]:
    return {
        "done": sum(stage.done for stage in stages),
        "tokens": sum(stage.supervised_tokens or 0.0 for stage in stages) or None,
        "seconds": sum(stage.seconds or 0.0 for stage in stages) or None,
    }
