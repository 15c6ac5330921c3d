"""The tables of a report as rows of cells, for the page and the terminal alike."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import groupby
from typing import TYPE_CHECKING, Literal

from dominie.core.task_result import FORGETTING, LIKENESS
from dominie.report.formatting import DASH, figure, percent, score_text, signed_points, span
from dominie.report.headline import Change, change

if TYPE_CHECKING:
    from collections.abc import Container, Iterable, Mapping, Sequence

    from dominie.core.run_records import Run, Stage
    from dominie.core.task_result import Estimate, TaskResult
    from dominie.report.compare import Comparison, Point

SCORE = "score"
_SAME = 1e-9
_UNITS = {
    "kl": "KL, nats",
    "loss": "loss, nats",
    "agreement": "agreement, %",
    "invalid": "invalid, %",
    "cut": "cut off, %",
    "empty": "empty, %",
    "unanswered": "unanswered, %",
    "length_controlled_win_rate": "at equal length, %",
}
_COMPETING = ("kl", "loss", "agreement")
_FRACTIONS = ("invalid", "cut", "empty", "unanswered", "length_controlled_win_rate")
_PAGE, _MODEL, _SCORE, _STRIP, _FIGURE = 60, 7, 8, 9, 5  # widths in em: page and columns
_COUNTS = (
    ("read", "read"),
    ("removed_duplicates", "duplicates"),
    ("removed_held_out", "held out"),
    ("truncated", "truncated"),
    ("too_long", "too long"),
    ("kept", "kept"),
    ("train", "train"),
    ("validation", "validation"),
    ("test", "test"),
)


@dataclass(frozen=True)
class Column:
    """A column of results: the score of a task, or one of its further figures.

    Attributes:
        task: the task measured.
        key: `score`, or the name of the further figure.
        label: its heading below the task's name.
        n: how many rows every model was measured on, None if that differs or is not known.
        drawn: whether its scores are drawn on a strip beside the figures.
    """

    task: str
    key: str
    label: str
    n: int | None = None
    drawn: bool = False


@dataclass(frozen=True)
class Cell:
    """A figure in a table.

    Attributes:
        text: as it is printed.
        value: the figure itself, None if there is none.
        ends: of its 95 % interval.
        interval: the same as text, empty if it is not known.
        n: the number of rows, if it is not that of the whole column.
        mark: `best` of its column, or `tied` with the best within noise.
    """

    text: str = DASH
    value: float | None = None
    ends: tuple[float, float] | None = None
    interval: str = ""
    n: int | None = None
    mark: Literal["", "best", "tied"] = ""


@dataclass(frozen=True)
class Table:
    """Rows of cells under named columns."""

    columns: tuple[Column, ...]
    rows: tuple[tuple[str, tuple[Cell, ...]], ...]

    @property
    def tasks(self) -> tuple[tuple[str, tuple[Column, ...]], ...]:
        """The columns by task, in order."""
        return tuple((task, tuple(each)) for task, each in groupby(self.columns, _task))


def results_grid(run: Run, without: Container[str] = ()) -> Table:
    """Models × tasks, the best of each column marked; `without` names further figures."""
    columns = tuple(_columns(run, without))
    by_column = [_column_cells(run, column) for column in columns]
    rows = tuple((model, tuple(cells[model] for cells in by_column)) for model in run.results)
    return Table(columns, rows)


def group_table(run: Run, task: str) -> Table | None:
    """Families of a task × models; None if no model was measured by family."""
    models = [model for model, scores in run.results.items() if task in scores]
    by_model = {model: run.results[model][task].by for model in models}
    groups = dict.fromkeys(group for scores in by_model.values() for group in scores)
    if not groups:
        return None
    rows = []
    rated = run.rated(task)
    for group in groups:
        scores = [by_model[model].get(group) for model in models]
        common = _common_n(score for score in scores if score)
        rows.append((group, tuple(_score_cell(score, common, rated=rated) for score in scores)))
    return Table(tuple(Column(task, SCORE, model) for model in models), tuple(rows))


def baseline_changes(run: Run) -> list[tuple[str, dict[str, Change]]]:
    """Of each model how it differs from the baseline, by task.

    Left out are tasks without a paired difference, and agreement with a teacher: it is no ability.
    """
    if run.baseline is None:
        return []
    found = []
    for model in run.results:
        shared = [task for task in run.ability_tasks if task in run.results[model]]
        steps = {
            task: change(run, task, model, run.baseline)
            for task in shared
            if task in run.results[run.baseline] and model != run.baseline
        }
        steps = {task: step for task, step in steps.items() if step.paired is not None}
        if steps:
            found.append((model, steps))
    return found


@dataclass(frozen=True)
class DataRow:
    """What became of the rows of a source, in the stages that counted it alike."""

    source: str
    stages: tuple[str, ...]
    counts: Mapping[str, float | None]


@dataclass(frozen=True)
class DataTable:
    """The counts that some stage reported, by source."""

    keys: tuple[tuple[str, str], ...]
    rows: tuple[DataRow, ...]


def data_table(stages: Iterable[Stage]) -> DataTable:
    """What was read, removed, truncated and kept of each source.

    Stages that counted a source alike share a row.
    """
    merged: dict[tuple[str, tuple[float | None, ...]], list[str]] = {}
    for stage in stages:
        for source, counts in stage.data.items():
            figures = tuple(counts.get(key) for key, _ in _COUNTS)
            if any(value is not None for value in figures):
                merged.setdefault((source, figures), []).append(stage.name)
    keys = tuple(
        pair
        for index, pair in enumerate(_COUNTS)
        if any(figures[index] is not None for _, figures in merged)
    )
    sources = list(dict.fromkeys(source for source, _ in merged))
    rows = tuple(
        DataRow(source, tuple(names), dict(zip((key for key, _ in _COUNTS), figures, strict=True)))
        for (source, figures), names in sorted(
            merged.items(), key=lambda item: sources.index(item[0][0])
        )
    )
    return DataTable(keys, rows)


def _task(column: Column) -> str:
    return column.task


def _columns(run: Run, without: Container[str]) -> list[Column]:
    """Scores and further figures by task, with strips beside the scores if there is room."""
    columns = [column for column in _plain_columns(run) if column.key not in without]
    scores = sum(column.key == SCORE for column in columns)
    taken = _MODEL + _SCORE * scores + _FIGURE * (len(columns) - scores)
    strips = _STRIP * sum(column.drawn for column in columns)
    if taken + strips <= _PAGE:
        return columns
    return [replace(column, drawn=False) for column in columns]


def _plain_columns(run: Run) -> Iterable[Column]:
    for task in run.tasks:
        scores = [by_task[task] for by_task in run.results.values() if task in by_task]
        moved = run.metric(task) == FORGETTING  # shown in nats, which its score follows from
        label, drawn = run.measure(task), task in run.ability_tasks
        yield Column(task, SCORE, _UNITS["kl"] if moved else label, _common_n(scores), drawn)
        for key in dict.fromkeys(key for score in scores for key in score.extras):
            if moved and key == "kl":
                continue
            yield Column(task, key, _UNITS.get(key, key.replace("_", " ")))


def _column_cells(run: Run, column: Column) -> dict[str, Cell]:
    scores = {model: by_task.get(column.task) for model, by_task in run.results.items()}
    if column.key != SCORE:
        return _extra_cells(column.key, scores)
    likeness = run.metric(column.task) in LIKENESS
    ranked = {
        model: score
        for model, score in scores.items()
        if score and not (likeness and score.score > 1 - _SAME)
    }
    best = max(ranked, key=lambda model: ranked[model].score, default="")
    cells = {}
    for model, score in scores.items():
        mark: Literal["", "best", "tied"] = ""
        if model in ranked:
            if ranked[model].score == ranked[best].score:
                mark = "best"
            elif run.within_noise(column.task, model, best):
                mark = "tied"
        cells[model] = _score_cell(score, column.n, mark, rated=run.rated(column.task))
        if likeness and score and model not in ranked:  # to itself: nothing to estimate
            cells[model] = replace(cells[model], ends=None, interval="")
    return cells


def _extra_cells(key: str, scores: Mapping[str, TaskResult | None]) -> dict[str, Cell]:
    """Further figures; the reference itself (agreement 1, KL 0) competes with nobody."""
    values = {model: score.extras.get(key) if score else None for model, score in scores.items()}
    agreement = key == "agreement"
    known = [
        value
        for value in values.values()
        if value is not None and not (value > 1 - _SAME if agreement else value < _SAME)
    ]
    best = (max if agreement else min)(known) if known and key in _COMPETING else None
    cells = {}
    few = bool(known) and min(known) >= 0.001 and max(known) < 1000  # one precision for a column
    for model, value in values.items():
        if agreement or value is None or key in _FRACTIONS:
            text = percent(value)
        else:
            text = f"{value:.3f}" if few else figure(value)
        cells[model] = Cell(text, value, mark="best" if value == best is not None else "")
    return cells


def _score_cell(
    score: TaskResult | None,
    common_n: int | None,
    mark: Literal["", "best", "tied"] = "",
    *,
    rated: bool = False,
) -> Cell:
    if score is None:
        return Cell()
    n = None if score.n == common_n else score.n
    if (kl := score.kl) is not None:
        interval = f"{figure(kl.low)}{DASH}{figure(kl.high)}"
        return Cell(figure(kl.estimate), kl.estimate, kl.ends, interval, n)  # a meter, no contest
    ends = score.ends
    interval = span(ends, rated=rated) if ends else ""
    return Cell(score_text(score.score, rated=rated), score.score, ends, interval, n, mark)


def _common_n(scores: Iterable[TaskResult]) -> int | None:
    counts = {score.n for score in scores}
    return counts.pop() if len(counts) == 1 else None


def sources_of(stages: Sequence[Stage]) -> tuple[str, ...]:
    """Every source that a stage read, had a teacher for or measured, in order of appearance."""
    names: dict[str, None] = {}
    for stage in stages:
        names |= dict.fromkeys((*stage.data, *stage.teachers))
        for measured in (stage.evaluations, stage.train):
            names |= dict.fromkeys(source for line in measured[:1] for source in line.sources)
    return tuple(names)


def comparison_headings(comparison: Comparison) -> list[str]:
    """The headings of a comparison's table."""
    scores = [f"{task} %" for task in comparison.tasks]
    differences = [f"Δ {task}" for task in comparison.tasks] if comparison.against else []
    return [*scores, *differences, "runs"]


def comparison_rows(comparison: Comparison) -> list[tuple[Point, list[str]]]:
    """Points with their cells, best on the second task first."""
    rows = []
    for point in sorted(comparison.points, key=lambda point: -point.y.mean):
        cells = [_mean_cell(point.x), _mean_cell(point.y)]
        if comparison.against:
            cells += [_difference_cell(each) for each in point.differences or (None, None)]
        rows.append((point, [*cells, str(point.runs)]))
    return rows


def comparison_note(comparison: Comparison) -> str:
    """What the figures of a comparison's table are."""
    note = "± 95 % interval, over questions and runs"
    if comparison.against is None:
        return note
    return f"{note} · Δ to {comparison.against}, in points, run by run; *: the interval excludes 0"


def _mean_cell(found: Estimate) -> str:
    return percent(found.mean) + ("" if found.half is None else f" ±{percent(found.half)}")


def _difference_cell(found: Estimate | None) -> str:
    if found is None:
        return DASH
    half = "" if found.half is None else f" ±{percent(found.half)}"
    return f"{signed_points(found.mean)}{half}{'*' if found.significant else ''}"
