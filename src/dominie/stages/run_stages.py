"""Runs a recipe's stages in dependency order: skips what is done, resumes what was interrupted."""

from __future__ import annotations

import contextlib
import functools
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from filelock import FileLock

from dominie.core.display import Display
from dominie.core.distributed import (
    broadcast_from_main,
    init_distributed,
    is_main_process,
    main_process_first,
    world_size,
)
from dominie.core.errors import InputError
from dominie.core.hardware import versions
from dominie.core.io import empty_folder, file_manifest, manifest_error, write_atomic
from dominie.core.run_reader import read_stage
from dominie.models.model_folder import is_model
from dominie.recipe import dump_recipe
from dominie.stages.fingerprint import changes, moved
from dominie.stages.prepare import Preparation
from dominie.stages.run_folder import RunFolder, check_whole, set_aside, write_stage
from dominie.stages.stage_kind import Prepared, StageRun, stage_kind

_LEFT = shutil.ignore_patterns("checkpoints", ".*")


@contextlib.contextmanager
def stage_lock(runs: Path, fingerprint: str) -> Iterator[None]:
    """While active, no other run in this folder makes the stage of this fingerprint: they wait."""
    locks = runs / ".locks"
    locks.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):  # some file systems have no locks
            stack.enter_context(FileLock(locks / fingerprint, fallback_to_soft=False))
        yield


def reuse_stage(folder: RunFolder, name: str, fingerprint: str, display: Display) -> None:
    """Link the folder of a stage from another run that has finished the same, if there is one."""
    path = folder.stage(name)
    if path.exists() and read_stage(path).get("fingerprint") == fingerprint:
        return  # done, or to be gone on with
    found = _finished(folder.path.parent, fingerprint, display)
    if found is None:
        return
    scratch = path.with_name(f".taking-{name}")
    scratch.parent.mkdir(parents=True, exist_ok=True)
    empty_folder(scratch)
    shutil.copytree(found, scratch, ignore=_LEFT, copy_function=_link, dirs_exist_ok=True)
    origin = f"{found.parent.name}/{found.name}"
    stage = stage_kind(folder.recipe, name)
    own = {"name": name, **stage.names_in_record, "taken_from": origin}
    write_stage(scratch, {**read_stage(found), **own})
    if path.exists():
        kept = set_aside(path)
        display.line(f"{name}: what it depends on has changed; the earlier result is in {kept}")
    scratch.rename(path)
    display.line(f"{name}: taken from {origin}, which depends on the same")


def _finished(runs: Path, fingerprint: str, display: Display) -> Path | None:
    """Find the folder of a finished, whole stage with this fingerprint in any of the runs."""
    for file in sorted(runs.glob("*/*/stage.json")):
        if file.parent.name.startswith("."):
            continue  # half linked, by a run that was killed
        try:
            record = read_stage(file.parent)
        except InputError:
            continue  # another run's trouble
        done = record.get("fingerprint") == fingerprint and record.get("status") == "done"
        whole = is_model(file.parent / "model") or (file.parent / "data").is_dir()
        if not (done and whole):
            continue
        if (found := manifest_error(file.parent, record.get("files", {}))) is None:
            return file.parent
        display.line(f"{file.parent}: not taken, it is damaged: {found}")
    return None


def _link(source: str, target: str) -> None:
    """Link a file, or copy it; files of finished stages are never written again."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def run_stages(folder: RunFolder, display: Display, *, reuse: bool = False) -> dict[str, str]:
    """Run what is not done, here or, with `reuse`, by another run beside this one.

    Returns:
        The fingerprint of every stage.
    """
    if world_size() > 1:
        init_distributed(cpu=bool(folder.recipe.train.arguments.get("use_cpu")))
    with main_process_first():
        preparation = Preparation(folder, display)
        stages = preparation.all()
        if is_main_process():
            write_atomic(folder.path / "recipe.yaml", dump_recipe(folder.described))
    broadcast_from_main(lambda: _check_begun(folder, stages))  # before any other is trained
    reuse = reuse and world_size() == 1  # they would wait for each other
    for stage in stages:
        if stage.waits_for:
            with main_process_first():
                stage = preparation.stage(stage.name)
            broadcast_from_main(functools.partial(_check_begun, folder, [stage]))
        if reuse:
            with stage_lock(folder.path.parent, stage.fingerprint):
                reuse_stage(folder, stage.name, stage.fingerprint, display)
                run_stage(folder, stage, display)
        else:
            run_stage(folder, stage, display)
        preparation.check_made(stage.name)
    return {name: preparation.fingerprints[name] for name in folder.recipe.stages}


def run_stage(folder: RunFolder, prepared: Prepared, display: Display) -> None:
    """Make the model or the data of a stage, unless they exist."""
    name, stage = prepared.name, prepared.stage
    earlier = broadcast_from_main(lambda: _interrupted(folder, prepared, display))
    if earlier is None:
        return
    record: dict[str, Any] = {
        "name": name,
        "status": "running",
        "kind": stage.kind,
        "fingerprint": prepared.fingerprint,
        **stage.names_in_record,
        "depends": dict(prepared.depends),
        **_surroundings(),
    }
    run = StageRun(folder, prepared, record, earlier, display)
    record |= stage.run(run)
    record |= {"status": "done", "description": stage.describe(record)}
    if is_main_process():
        write_stage(run.path, record | {"files": _written(run.path)})
        # Not before the stage is known to be done.
        shutil.rmtree(run.path / "checkpoints", ignore_errors=True)
    display.done(name, record["description"])


def _checkpoints(stage: Path) -> list[Path]:
    """The checkpoints of a stage, whole or not; without transformers' trainer if it has none."""
    folder = stage / "checkpoints"
    if not folder.is_dir():
        return []
    from dominie.training.checkpoints import by_step

    return by_step(folder)


def _interrupted(folder: RunFolder, prepared: Prepared, display: Display) -> dict[str, Any] | None:
    """The record of a stage that was cut off, empty before its start; None if it is done.

    The result of an earlier recipe is moved out of the way.
    """
    name, path = prepared.name, folder.stage(prepared.name)
    earlier = read_stage(path)
    same = earlier.get("fingerprint") == prepared.fingerprint
    stage = prepared.stage
    if same and earlier.get("status") == "done" and (path / stage.makes).is_dir():
        check_whole(path, earlier, display)
        shutil.rmtree(path / "checkpoints", ignore_errors=True)
        display.done(name, f"already {stage.past} ({stage.describe(earlier)})")
        return None
    if path.is_dir() and not any(path.iterdir()):
        path.rmdir()  # an earlier start came no further
    if path.exists() and not same:
        kept = set_aside(path)
        why = "what it depends on has changed" if earlier else "its folder has no stage.json"
        changed = _changed(earlier, prepared)
        named = f" ({'; '.join(changed)})" if changed else ""
        display.line(f"{name}: {why}{named}; the earlier result is kept in {kept}")
    if same and _checkpoints(path) and (apart := moved(earlier, _surroundings())):
        display.line(f"{name}: goes on with {', '.join(apart)}; that may round differently")
    path.mkdir(parents=True, exist_ok=True)
    return earlier if same else {}


def _check_begun(folder: RunFolder, stages: Sequence[Prepared]) -> None:
    """Refuse to discard a half-trained stage because of a changed recipe.

    Raises:
        InputError: names what has changed, and how to continue.
    """
    for prepared in stages:
        path = folder.stage(prepared.name)
        record, begun = read_stage(path), _checkpoints(path)
        same = record.get("fingerprint") == prepared.fingerprint or prepared.waits_for
        if same or record.get("status") != "running" or not begun:
            continue
        raise InputError(
            "the stage is half trained, and what it depends on has changed since",
            where=str(path),
            found="; ".join(_changed(record, prepared)) or None,
            do=f"put that back to go on from {begun[-1].name}; "
            f"or move {path} away to train it again",
        )


def _changed(record: Mapping[str, Any], prepared: Prepared) -> list[str]:
    """Describe what has changed since a stage was recorded, if it has its dependencies."""
    return changes(record["depends"], prepared.depends) if "depends" in record else []


def _surroundings() -> dict[str, Any]:
    """Ranks and versions, which a stage does not depend on."""
    packages = ("dominie", "torch", "transformers", "accelerate", "peft", "datasets")
    return {"ranks": world_size(), "versions": versions(packages)}


def _written(path: Path) -> dict[str, dict[str, Any]]:
    """List the files of a finished stage but the model card, which may be edited."""
    model = [part for part in (path / "model").rglob("*") if part.name != "README.md"]
    parts = [*model, *(path / "data").rglob("*")]
    return file_manifest(path, [*parts, path / "metrics.jsonl"])
