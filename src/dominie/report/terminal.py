"""The results of a run in the terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dominie.report.formats import percent
from dominie.report.headline import Sentence, findings
from dominie.report.reading import read_run
from dominie.report.tables import SCORE, Cell, results_grid

if TYPE_CHECKING:
    from pathlib import Path

    from rich.console import RenderableType
    from rich.text import Text

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
        unit = "%" if column.key == SCORE else column.label
        size = f"n = {column.n:,}" if column.n is not None else ""
        heading = Text.assemble(column.task, "\n", (unit, "dim"), "\n", (size, "dim"))
        table.add_column(heading, justify="right")
    for model, cells in grid.rows:
        chosen = "bold" if model == found.model else ""
        table.add_row(Text(model, style=chosen), *(_written(cell) for cell in cells))
    note = Text("± 95 % interval · bold: best of its column · ≈: within noise of the best", "dim")
    return Group(headline, Text(), table, note)


def _written(cell: Cell) -> Text:
    from rich.text import Text

    tie = "≈" if cell.mark == "tied" else ""
    interval = "" if cell.half_width is None else f" ±{percent(cell.half_width)}"
    return Text.assemble(
        (tie, "dim"),
        (cell.text, "bold" if cell.mark == "best" else ""),
        (f"{interval:>5}", "dim"),
    )


def _styled(sentence: Sentence) -> Text:
    from rich.text import Text

    return Text.assemble(*((part.text, _STYLES[part.kind]) for part in sentence))
