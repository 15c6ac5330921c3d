"""`dominie sweep`: a grid of values and seeds, run, tabulated, and the best of it named."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from dominie.display import Display
from dominie.errors import InputError
from dominie.processes.threads import cores
from dominie.recipe import load_recipe
from dominie.sweep.cells import Cell, grid, seeds_of
from dominie.sweep.runner import run_cells
from dominie.sweep.selection import best_cells, check_selection
from dominie.sweep.table import Row, points, rows_of, write_csv


def sweep_recipe(
    recipe: Path,
    *,
    over: Sequence[str],
    seeds: str | None,
    fixed: Sequence[str],
    only: Sequence[str],
    best_by: Sequence[str],
    jobs: int | None,
    runs: Path,
    display: Display,
    print_json: Callable[[str], Any] | None = None,
) -> Path:
    """Run every point of a grid under every seed.

    Args:
        recipe: the recipe's file.
        over: `a.b.c=1,2,3` each.
        seeds: `0-4` say; None runs the recipe's own.
        fixed: overrides of all runs.
        only: the models that are scored; all where empty.
        best_by: tasks on a validation split to choose each model's values by.
        jobs: processes at a time; None is the number of cores.
        runs: where the sweep's folder is made.
        display: shows progress.
        print_json: prints the results as one object.

    Returns:
        The sweep's folder: its runs, a log beside each, and `results.csv`.
    """
    cells = grid(recipe, over, seeds=seeds_of(seeds) if seeds else (None,), fixed=fixed, only=only)
    first = cells[0].loaded()
    check_selection(first, best_by)
    if first.evaluate is None:
        raise InputError(
            "a sweep compares scores, and the recipe evaluates nothing",
            where=str(recipe),
            do="add evaluate: models and tasks",
        )
    if not over and seeds is None:
        raise InputError(
            "there is nothing to vary",
            where="dominie sweep",
            expected="--over KEY=V1,V2, --seeds 0-4, or both",
            do=f"`dominie run {recipe}` runs the recipe once",
        )
    folder = runs / f"{load_recipe(recipe, fixed).name}-sweep"
    by_cell: dict[str, list[Row]] = {}

    def finished(cell: Cell) -> None:
        by_cell[cell.name] = rows_of(cell, folder)
        write_csv([row for c in cells for row in by_cell.get(c.name, [])], folder / "results.csv")

    run_cells(
        cells, folder, jobs=cores() if jobs is None else jobs, display=display, finished=finished
    )
    rows = [row for cell in cells for row in by_cell[cell.name]]
    best = best_cells(rows, best_by) if best_by else {}
    keys = list(cells[0].values)
    if print_json:
        chosen = {m: dict(zip(keys, values, strict=True)) for m, values in best.items()}
        print_json(
            json.dumps({"sweep": str(folder), "rows": [r.flat() for r in rows], "best": chosen})
        )
        return folder
    display.console.print(_table(rows, keys, best))
    for model, values in best.items():
        told = " ".join(f"{key}={value}" for key, value in zip(keys, values, strict=True))
        display.line(f"best of {model} by {' + '.join(best_by)}: {told}")
    display.line(f"results  {folder / 'results.csv'}")
    return folder


def _table(rows: Sequence[Row], keys: Sequence[str], best: dict[str, tuple[str, ...]]) -> Table:
    """Means over seeds: a line for each point of the grid and model, a column for each task."""
    tasks = list(dict.fromkeys(row.task for row in rows))
    table = Table(box=SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for name in (*(key.rpartition(".")[2] for key in keys), "model"):
        table.add_column(name, no_wrap=True)
    for task in tasks:
        table.add_column(f"{task}\n%", justify="right")
    for (values, model), scores in points(rows).items():
        chosen = best.get(model) == values
        cells = [_mean(scores[task]) if task in scores else "–" for task in tasks]
        table.add_row(*values, model, *cells, style="bold" if chosen else None)
    table.caption = "mean over seeds ± standard deviation" + (" · bold: the best" if best else "")
    return table


def _mean(scores: Sequence[float]) -> str:
    spread = f" ±{100 * statistics.stdev(scores):.1f}" if len(scores) > 1 else ""
    return f"{100 * statistics.fmean(scores):.1f}{spread}"
