"""Runs the cells of a sweep as processes of their own, several at a time; goes on where it was."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from dominie.display import Display
from dominie.errors import InputError, RunError
from dominie.files.json_files import write_json
from dominie.models.remote_code import passed_on
from dominie.sweep.cells import Cell

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
