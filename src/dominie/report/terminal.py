"""The results of a run, and a comparison of runs, in the terminal."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from dominie.core.run_records import read_run
from dominie.report.formatting import DASH, signed_points
from dominie.report.headline import findings
from dominie.report.tables import (
    SCORE,
    Cell,
    baseline_changes,
    comparison_headings,
    comparison_note,
    comparison_rows,
    results_grid,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence
    from pathlib import Path

    from rich.console import Console, ConsoleOptions, RenderableType
    from rich.text import Text

    from dominie.core.run_records import Run
    from dominie.report.compare import Comparison
    from dominie.report.formatting import RichText
    from dominie.report.headline import Change

_STYLES = {"text": "", "model": "bold", "task": "italic"}
_NAME = 28  # characters of a model's name
_APART = 3  # characters between columns


def results_table(run: Path) -> RenderableType:
    """The headline of a run above its table of models and tasks, to be printed by rich.

    Args:
        run: the run folder, `runs/NAME`.

    Raises:
        InputError: the folder is missing, or is no run folder.
    """
    contents = read_run(run)
    found = findings(contents)
    headline = _styled(found.headline)
    return _Results(contents, headline, found.model) if contents.results else headline


def comparison_table(comparison: Comparison) -> RenderableType:
    """The models of a comparison, best on the second task first, to be printed by rich."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(box=SIMPLE_HEAD, pad_edge=False, show_edge=False)
    table.add_column("")
    table.add_column("model", no_wrap=True)
    for heading in comparison_headings(comparison):
        table.add_column(heading, justify="right")
    for point, cells in comparison_rows(comparison):
        table.add_row("●" if point.on_front else "", point.name, *cells)
    table.caption = f"{comparison_note(comparison)} · ● on the Pareto front"
    return table


@dataclass(frozen=True)
class _Column:
    """A column of a table: its heading, of any lines, and a cell for every model."""

    heading: Text
    cells: tuple[Text, ...]

    @property
    def width(self) -> int:
        lines = [line for text in (self.heading, *self.cells) for line in text.split()]
        return max((line.cell_len for line in lines), default=0)


@dataclass(frozen=True)
class _Results:
    """The results as tables no wider than the terminal: what does not fit goes below."""

    run: Run
    headline: Text
    chosen: str | None

    def __rich_console__(self, _: Console, options: ConsoleOptions) -> Iterator[RenderableType]:
        from rich.text import Text

        yield self.headline
        yield Text()
        names = [
            Text(name, style="bold" if name == self.chosen else "") for name in self.run.results
        ]
        model = _Column(Text("model"), tuple(names))
        yield from _fitted(model, list(_score_columns(self.run)), options.max_width)
        yield Text("with 95 % intervals · bold: best of its column · ≈: within noise of it", "dim")
        if steps := baseline_changes(self.run):
            heading = Text.assemble(("points over", "dim"), "\n", self.run.baseline or "")
            models = _Column(heading, tuple(Text(model) for model, _ in steps))
            yield Text()
            yield from _fitted(
                models, list(_difference_columns(self.run, steps)), options.max_width
            )


def _fitted(first: _Column, others: Sequence[_Column], width: int) -> Iterator[RenderableType]:
    """Tables of as many columns as there is room for, the first column in each."""
    from rich.text import Text

    part: list[_Column] = []
    taken = room = min(_NAME, first.width)
    for column in others:
        if part and taken + _APART + column.width > width:
            yield _table(first, part)
            yield Text()
            part, taken = [], room
        part.append(column)
        taken += _APART + column.width
    if part:
        yield _table(first, part)


def _table(first: _Column, others: Sequence[_Column]) -> RenderableType:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(box=SIMPLE_HEAD, pad_edge=False, show_edge=False)
    table.add_column(first.heading, max_width=_NAME, no_wrap=True, vertical="bottom")
    for column in others:
        table.add_column(column.heading, justify="right", vertical="bottom")
    for row in zip(first.cells, *(column.cells for column in others), strict=True):
        table.add_row(*row)
    return table


def _score_columns(run: Run) -> Iterable[_Column]:
    from rich.text import Text

    grid = results_grid(run)
    for index, column in enumerate(grid.columns):
        rated = run.rated(column.task)
        unit = column.label if column.key != SCORE or rated else "%"
        size = f"n = {column.n:,}" if column.n is not None else ""
        heading = Text.assemble(column.task, "\n", (unit, "dim"), "\n", (size, "dim"))
        yield _Column(heading, tuple(_score(cells[index]) for _, cells in grid.rows))


def _difference_columns(
    run: Run, steps: Sequence[tuple[str, Mapping[str, Change]]]
) -> Iterable[_Column]:
    """How every model differs from the baseline on the same questions, in points."""
    from rich.text import Text

    for task in run.tasks:
        if any(task in by_task for _, by_task in steps):
            cells = [_difference(by_task.get(task)) for _, by_task in steps]
            yield _Column(Text(task), tuple(cells))


def _difference(step: Change | None) -> Text:
    from rich.text import Text

    if step is None or step.paired is None:
        return Text(DASH)
    low, high = (signed_points(e, rated=step.rated) for e in (step.paired.low, step.paired.high))
    ends = f"({low} to {high})"
    if step.within_noise:
        return Text(f"within noise {ends}", "dim")
    return Text.assemble(signed_points(step.paired.estimate, rated=step.rated), " ", (ends, "dim"))


def _score(cell: Cell) -> Text:
    from rich.text import Text

    tie = "≈" if cell.mark == "tied" else ""
    return Text.assemble(
        (tie, "dim"),
        (cell.text, "bold" if cell.mark == "best" else ""),
        (f" {cell.interval:>9}" if cell.interval else "", "dim"),
    )


def _styled(rich_text: RichText) -> Text:
    from rich.text import Text

    return Text.assemble(*((part.text, _STYLES[part.kind]) for part in rich_text))
