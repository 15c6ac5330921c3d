"""`dominie sweep`: a grid of values and seeds, run, tabulated, and the best of it named."""

from __future__ import annotations

import json
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from dominie.core.display import Display
from dominie.core.errors import InputError, RunError
from dominie.core.hardware import cores
from dominie.core.io import write_json
from dominie.models.spec import passed_on
from dominie.recipe import load_recipe
from dominie.workflows.sweep_cells import (
    Cell,
    Row,
    best_cells,
    check_selection,
    grid,
    points,
    rows_of,
    seeds_of,
    write_csv,
)

#: What a cell's run folder says of its place in the sweep; written when the run has ended well.
RECORD = "sweep.json"


def run_cells(
    cells: Sequence[Cell],
    folder: Path,
    *,
    jobs: int,
    display: Display,
    finished: Callable[[Cell], None] = lambda _: None,
    deadline: float | None = None,
) -> list[Cell]:
    """Run what has not been run, `jobs` at a time, one thread each.

    Stages that depend on the same are trained once: cells take them over from each other.

    Args:
        cells: the sweep.
        folder: of its runs.
        jobs: processes at a time.
        display: shows progress.
        finished: called with each cell that is done, those done before included.
        deadline: `time.monotonic()` after which no further cell is begun.

    Returns:
        The cells that are done.

    Raises:
        InputError: a cell's recipe cannot be used; nothing has been run then.
        RunError: cells failed; all others have been run.
    """
    if jobs < 1:
        raise InputError(
            "no process to run in", where="--jobs", found=str(jobs), expected="1 or more"
        )
    digests = {cell.name: cell.digest() for cell in cells}
    done, waiting = [], []
    for cell in cells:
        if is_done(folder / cell.name, digests[cell.name]):
            done.append(cell)
            finished(cell)
        else:
            waiting.append(cell)
    if done:
        display.line(f"{len(done)} of {len(cells)} runs are done already")
    failed: dict[str, str] = {}
    running: dict[subprocess.Popen[bytes], tuple[Cell, float]] = {}
    started, number = time.monotonic(), len(waiting)
    try:
        while waiting or running:
            late = deadline is not None and time.monotonic() > deadline
            while waiting and len(running) < jobs and not late:
                cell = waiting.pop(0)
                running[_started(cell, folder)] = (cell, time.monotonic())
            if late and waiting:
                display.line(f"out of time: {len(waiting)} runs are left for another call")
                waiting = []
            for process in [each for each in running if each.poll() is not None]:
                cell, began = running.pop(process)
                seconds = time.monotonic() - began
                if process.returncode:
                    failed[cell.name] = _last_words(folder, cell)
                    display.line(f"{cell.name} failed: {failed[cell.name]}")
                    continue
                _record(cell, folder / cell.name, digests[cell.name], seconds)
                done.append(cell)
                ended = number - len(waiting) - len(running) - len(failed)
                left = (time.monotonic() - started) / max(ended, 1) * (len(waiting) + len(running))
                display.done(cell.name, f"{seconds:.0f} s; about {left:.0f} s left")
                finished(cell)
            time.sleep(0.05)
    except BaseException:
        _stop(list(running))
        raise
    if failed:
        name, words = next(iter(failed.items()))
        raise RunError(
            f"{len(failed)} of {len(cells)} runs failed; the others are done",
            where=str(folder / f"{name}.log"),
            found=words,
            do="mend it; the same command runs what is left",
        )
    return done


def is_done(run: Path, digest: str) -> bool:
    """Whether a cell's run has ended well, with the recipe as it is now."""
    try:
        recorded = json.loads((run / RECORD).read_text(encoding="utf-8"))["digest"] == digest
    except (OSError, ValueError, KeyError, TypeError):
        return False
    return recorded and (run / "recipe.yaml").is_file()


def _started(cell: Cell, folder: Path) -> subprocess.Popen[bytes]:
    """`dominie run` of a cell, in one thread; its words go to a file beside its folder."""
    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "dominie", *passed_on(), "run", str(cell.recipe)]
    command += [*cell.overrides, "--reuse", "--runs", str(folder)]
    if cell.only:
        command += ["--only", ",".join(cell.only)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with (folder / f"{cell.name}.log").open("wb") as log:
        return subprocess.Popen(
            command, stdout=log, stderr=log, stdin=subprocess.DEVNULL, env=environment
        )


def _record(cell: Cell, run: Path, digest: str, seconds: float) -> None:
    record = {
        "digest": digest,
        "seed": cell.seed,
        "values": dict(cell.values),
        "seconds": round(seconds, 1),
    }
    write_json(run / RECORD, record)


def _last_words(folder: Path, cell: Cell) -> str:
    """What a failed run said last: its error, all lines of it."""
    text = (folder / f"{cell.name}.log").read_text(encoding="utf-8", errors="replace")
    _, found, error = text.rpartition("error: ")
    return " ".join((error if found else text[-300:]).split())[:300]


def _stop(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    """Let every run save itself; the same command goes on from there."""
    for process in processes:
        process.send_signal(signal.SIGTERM)
    for process in processes:
        try:
            process.wait(timeout=60)
        except subprocess.TimeoutExpired:
            process.kill()


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
