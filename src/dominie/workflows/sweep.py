"""`dominie sweep`: runs a grid of values and seeds, and tabulates the scores."""

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
from dominie.core.io import create, write_json
from dominie.core.run_reader import read_object
from dominie.models.spec import passed_on
from dominie.recipe import load_recipe
from dominie.workflows.sweep_trials import (
    Row,
    Trial,
    best_values,
    check_selection,
    grid,
    points,
    rows_of,
    seeds_of,
    write_csv,
)

#: In a trial's run folder: its values and its recipe's digest, written when the run is done.
RECORD = "sweep.json"


def run_trials(
    trials: Sequence[Trial],
    folder: Path,
    *,
    jobs: int,
    display: Display,
    finished: Callable[[Trial], None] = lambda _: None,
    deadline: float | None = None,
) -> list[Trial]:
    """Run the trials that are not done, `jobs` at a time, one thread each.

    Equal stages are trained once: trials link them from each other.

    Args:
        jobs: processes at a time.
        finished: called with each trial that is done, or was done before.
        deadline: `time.monotonic()` after which no further trial is started.

    Returns:
        The trials that are done.

    Raises:
        InputError: a trial's recipe cannot be used; nothing has been run.
        RunError: trials failed; all others have been run.
    """
    if jobs < 1:
        raise InputError(
            "no process to run in", where="--jobs", found=str(jobs), expected="1 or more"
        )
    digests = {trial.name: trial.digest() for trial in trials}
    done, waiting = [], []
    for trial in trials:
        if is_done(folder / trial.name, digests[trial.name]):
            done.append(trial)
            finished(trial)
        else:
            waiting.append(trial)
    if done:
        display.line(f"{len(done)} of {len(trials)} runs are done already")
    failed: dict[str, str] = {}
    running: dict[subprocess.Popen[bytes], tuple[Trial, float]] = {}
    started, number = time.monotonic(), len(waiting)
    try:
        while waiting or running:
            is_late = deadline is not None and time.monotonic() > deadline
            while waiting and len(running) < jobs and not is_late:
                trial = waiting.pop(0)
                running[_start_run(trial, folder)] = (trial, time.monotonic())
            if is_late and waiting:
                display.line(f"out of time: {len(waiting)} runs are left for another call")
                waiting = []
            for process in [each for each in running if each.poll() is not None]:
                trial, began = running.pop(process)
                seconds = time.monotonic() - began
                if process.returncode:
                    failed[trial.name] = _last_error(folder, trial)
                    display.line(f"{trial.name} failed: {failed[trial.name]}")
                    continue
                record = {
                    "digest": digests[trial.name],
                    "seed": trial.seed,
                    "values": dict(trial.values),
                    "seconds": round(seconds, 1),
                }
                write_json(folder / trial.name / RECORD, record)
                done.append(trial)
                ended = number - len(waiting) - len(running) - len(failed)
                left = (time.monotonic() - started) / max(ended, 1) * (len(waiting) + len(running))
                display.done(trial.name, f"{seconds:.0f} s; about {left:.0f} s left")
                finished(trial)
            time.sleep(0.05)
    except BaseException:
        _stop(list(running))
        raise
    if failed:
        name, error = next(iter(failed.items()))
        raise RunError(
            f"{len(failed)} of {len(trials)} runs failed; the others are done",
            where=str(folder / f"{name}.log"),
            found=error,
            do="correct it; the same command runs what is left",
        )
    return done


def is_done(run: Path, digest: str) -> bool:
    """Return whether a trial's run is done with the recipe as it is now."""
    recorded = read_object(run / RECORD, []).get("digest") == digest
    return recorded and (run / "recipe.yaml").is_file()


def _start_run(trial: Trial, folder: Path) -> subprocess.Popen[bytes]:
    """Start `dominie run` of a trial in one thread; its output goes to a file beside its folder."""
    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "dominie", *passed_on(), "run", str(trial.recipe)]
    command += [*trial.overrides, "--reuse", "--runs", str(folder)]
    if trial.only:
        command += ["--only", ",".join(trial.only)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with create(folder / f"{trial.name}.log") as log:
        return subprocess.Popen(
            command, stdout=log, stderr=log, stdin=subprocess.DEVNULL, env=environment
        )


def _last_error(folder: Path, trial: Trial) -> str:
    """Return the error that ended a failed run, from its log, in one line."""
    text = (folder / f"{trial.name}.log").read_text(encoding="utf-8", errors="replace")
    _, found, error = text.rpartition("error: ")
    return " ".join((error if found else text[-300:]).split())[:300]


def _stop(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    """Send SIGTERM to the runs, which save, and wait; the same command resumes them."""
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
        seeds: as in `0-4`; None runs the recipe's own.
        fixed: overrides of all runs.
        only: the models that are scored; empty is all.
        best_by: tasks on a validation split to choose each model's values by.
        jobs: processes at a time; None is the number of cores.
        runs: where the sweep's folder is made.
        print_json: prints the results as one object.

    Returns:
        The sweep's folder: its runs, a log beside each, and `results.csv`.
    """
    trials = grid(recipe, over, seeds=seeds_of(seeds) if seeds else (None,), fixed=fixed, only=only)
    recipe_of_first = trials[0].loaded()
    check_selection(recipe_of_first, best_by)
    if recipe_of_first.evaluate is None:
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
    by_trial: dict[str, list[Row]] = {}

    def finished(trial: Trial) -> None:
        by_trial[trial.name] = rows_of(trial, folder)
        write_csv([row for c in trials for row in by_trial.get(c.name, [])], folder / "results.csv")

    run_trials(
        trials, folder, jobs=cores() if jobs is None else jobs, display=display, finished=finished
    )
    rows = [row for trial in trials for row in by_trial[trial.name]]
    best = best_values(rows, best_by) if best_by else {}
    keys = list(trials[0].values)
    if print_json:
        chosen = {m: dict(zip(keys, values, strict=True)) for m, values in best.items()}
        print_json(
            json.dumps({"sweep": str(folder), "rows": [r.flat() for r in rows], "best": chosen})
        )
        return folder
    display.console.print(_table(rows, keys, best))
    for model, values in best.items():
        line = " ".join(f"{key}={value}" for key, value in zip(keys, values, strict=True))
        display.line(f"best of {model} by {' + '.join(best_by)}: {line}")
    display.line(f"results  {folder / 'results.csv'}")
    return folder


def _table(rows: Sequence[Row], keys: Sequence[str], best: dict[str, tuple[str, ...]]) -> Table:
    """Return means over seeds: a row for each point and model, a column for each task."""
    tasks = list(dict.fromkeys(row.task for row in rows))
    table = Table(box=SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for name in (*(key.rpartition(".")[2] for key in keys), "model"):
        table.add_column(name, no_wrap=True)
    for task in tasks:
        table.add_column(f"{task}\n%", justify="right")
    for (values, model), scores in points(rows).items():
        is_best = best.get(model) == values
        means = [_mean(scores[task]) if task in scores else "–" for task in tasks]
        table.add_row(*values, model, *means, style="bold" if is_best else None)
    table.caption = "mean over seeds ± standard deviation" + (" · bold: the best" if best else "")
    return table


def _mean(scores: Sequence[float]) -> str:
    spread = f" ±{100 * statistics.stdev(scores):.1f}" if len(scores) > 1 else ""
    return f"{100 * statistics.fmean(scores):.1f}{spread}"
