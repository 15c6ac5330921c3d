"""Stages that another run has finished: taken over where nothing they depend on differs."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dominie.display import Display
from dominie.errors import InputError
from dominie.models.folders import is_model
from dominie.recipe import Stage
from dominie.running.folder import RunFolder, read_stage, set_aside, write_stage

_LEFT = shutil.ignore_patterns("checkpoints", ".*")


@contextlib.contextmanager
def turn(runs: Path, fingerprint: str) -> Iterator[None]:
    """Within, no other run of these makes the stage of this fingerprint: the others wait for it."""
    locks = runs / ".locks"
    locks.mkdir(parents=True, exist_ok=True)
    with (locks / fingerprint).open("a") as lock:
        with contextlib.suppress(OSError):
            fcntl.flock(lock, fcntl.LOCK_EX)  # ends with the process; some file systems have none
        yield


def take_over(folder: RunFolder, name: str, fingerprint: str, display: Display) -> None:
    """Link a stage's folder from a sibling run that has finished the same; else do nothing."""
    path = folder.stage(name)
    if path.exists() and read_stage(path).get("fingerprint") == fingerprint:
        return  # done, or to be gone on with
    found = _finished(folder.path.parent, fingerprint)
    if found is None:
        return
    scratch = path.with_name(f".taking-{name}")
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.parent.mkdir(parents=True, exist_ok=True)
    shutil.copytree(found, scratch, ignore=_LEFT, copy_function=_link)
    origin = f"{found.parent.name}/{found.name}"
    stage = folder.recipe.stages[name]
    own: dict[str, Any] = {"name": name, "student": stage.models[0], "taken_from": origin}
    if isinstance(stage, Stage):
        own["teachers"] = {source: stage.teacher_on(source) for source in stage.active}
    write_stage(scratch, {**read_stage(found), **own})
    if path.exists():
        kept = set_aside(path)
        display.line(f"{name}: what it depends on has changed; the earlier result is in {kept}")
    scratch.rename(path)
    display.line(f"{name}: taken from {origin}, which depends on the same")


def _finished(runs: Path, fingerprint: str) -> Path | None:
    """The folder of a finished stage with this fingerprint, in any of the runs."""
    for file in sorted(runs.glob("*/*/stage.json")):
        if file.parent.name.startswith("."):
            continue  # half linked, by a run that was killed
        try:
            record = read_stage(file.parent)
        except InputError:
            continue  # another run's trouble
        done = record.get("fingerprint") == fingerprint and record.get("status") == "done"
        if done and is_model(file.parent / "model"):
            return file.parent
    return None


def _link(source: str, target: str) -> None:
    """The same file under a second name: what is written once is never written to again."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
