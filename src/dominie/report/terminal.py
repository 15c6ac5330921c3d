"""The results of a run in the terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dominie.report.formats import DASH, signed_points
from dominie.report.headline import findings
from dominie.report.reading import read_run
from dominie.report.records import RATED
from dominie.report.tables import SCORE, Cell, baseline_changes, results_grid

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from rich.console import RenderableType
    from rich.text import Text

    from dominie.report.changes import Change
    from dominie.report.records import Run
    from dominie.report.sentences import Sentence

_STYLES = {"text": "", "model": "bold", "task": "italic"}


def results_table(run: Path) -> RenderableType:
    """The headline of a run above its table of models and tasks, to be printed by rich.

    Args:
        run: the run folder, `runs/NAME`.

    Raises:
        InputError: the folder is missing, or is no run folder.
    """
    from rich.box import SIMPLE_HEAD
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    contents = read_run(run)
    found = findings(contents)
    headline = _styled(found.headline)
    if not contents.results:
        return headline
    grid = results_grid(contents)
    table = Table(box=SIMPLE_HEAD, pad_edge=False, show_edge=False)
    table.add_column("model", min_width=9, max_width=28, no_wrap=True)
    for column in grid.columns:
        unit = column.label if column.key != SCORE or contents.metric(column.task) == RATED else "%"
        size = f"n = {column.n:,}" if column.n is not None else ""
        heading = Text.assemble(column.task, "\n", (unit, "dim"), "\n", (size, "dim"))
        table.add_column(heading, justify="right")
    for model, cells in grid.rows:
        chosen = "bold" if model == found.model else ""
        table.add_row(Text(model, style=chosen), *(_written(cell) for cell in cells))
    note = Text("with 95 % intervals · bold: best of its column · ≈: within noise of it", "dim")
    parts: list[RenderableType] = [headline, Text(), table, note]
    if steps := baseline_changes(contents):
        parts += [Text(), _differences(contents, steps)]
    return Group(*parts)


def _differences(run: Run, steps: Sequence[tuple[str, Mapping[str, Change]]]) -> RenderableType:
    """How every model differs from the baseline on the same questions, in points."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    tasks = [task for task in run.tasks if any(task in by_task for _, by_task in steps)]
    table = Table(box=SIMPLE_HEAD, pad_edge=False, show_edge=False)
    heading = Text.assemble(("points over", "dim"), "\n", run.baseline or "")
    table.add_column(heading, min_width=9, max_width=28, no_wrap=True)
    for task in tasks:
        table.add_column(Text(task), justify="right", vertical="bottom")
    for model, by_task in steps:
        cells = [_difference(by_task[t]) if t in by_task else Text(DASH) for t in tasks]
        table.add_row(Text(model), *cells)
    return table


def _difference(step: Change) -> Text:
    from rich.text import Text

    paired = step.paired
    assert paired is not None, "of these alone the table is made"
    ends = f"({signed_points(paired.low)} to {signed_points(paired.high)})"
    if step.within_noise:
        return Text(f"within noise {ends}", "dim")
    return Text.assemble(signed_points(paired.value), " ", (ends, "dim"))


def _written(cell: Cell) -> Text:
    from rich.text import Text

    tie = "≈" if cell.mark == "tied" else ""
    return Text.assemble(
        (tie, "dim"),
        (cell.text, "bold" if cell.mark == "best" else ""),
        (f" {cell.interval:>9}" if cell.interval else "", "dim"),
    )


def _styled(sentence: Sentence) -> Text:
    from rich.text import Text

    return Text.assemble(*((part.text, _STYLES[part.kind]) for part in sentence))
