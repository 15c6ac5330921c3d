"""Runs a recipe's stages in dependency order: skips what is done, resumes what was interrupted."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
import os
import shutil
import time
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
from dominie.core.hardware import use_free_cores
from dominie.core.io import file_manifest, write_atomic
from dominie.core.run_reader import read_stage
from dominie.models.spec import is_model
from dominie.recipe import MergeStage, Stage, dump_recipe
from dominie.stages.fingerprint import changes, moved
from dominie.stages.prepare import prepare_stages
from dominie.stages.prepared import Prepared, PreparedTraining, PreparedUpcycle
from dominie.stages.run_folder import RunFolder, check_whole, set_aside, write_stage
from dominie.stages.teacher_caches import filled_caches
from dominie.training.checkpoints import by_step, publish, writing

_LEFT = shutil.ignore_patterns("checkpoints", ".*")


@contextlib.contextmanager
def turn(runs: Path, fingerprint: str) -> Iterator[None]:
    """Within, no other run of these makes the stage of this fingerprint: the others wait for it."""
    locks = runs / ".locks"
    locks.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):  # some file systems have no locks
            stack.enter_context(FileLock(locks / fingerprint, fallback_to_soft=False))
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


def run_stages(folder: RunFolder, display: Display, *, reuse: bool = False) -> dict[str, str]:
    """Run what is not done, here or, with `reuse`, by another run beside this one.

    Returns:
        The fingerprint of every stage.
    """
    if world_size() > 1:
        init_distributed(cpu=bool(folder.recipe.train.arguments.get("use_cpu")))
    with main_process_first():
        prepared = prepare_stages(folder, display)
        if is_main_process():
            write_atomic(folder.path / "recipe.yaml", dump_recipe(folder.recipe))
    broadcast_from_main(lambda: _check_begun(folder, prepared))  # before any other is trained
    reuse = reuse and world_size() == 1  # they would wait for each other
    for stage in prepared:
        if not reuse:
            run_stage(folder, stage, display)
            continue
        with turn(folder.path.parent, stage.fingerprint):
            take_over(folder, stage.name, stage.fingerprint, display)
            run_stage(folder, stage, display)
    return {stage.name: stage.fingerprint for stage in prepared}


def run_stage(folder: RunFolder, prepared: Prepared, display: Display) -> None:
    """Make a stage's model, or say why it need not be."""
    name, path = prepared.name, folder.stage(prepared.name)
    earlier = broadcast_from_main(lambda: _to_go_on_from(folder, prepared, display))
    if earlier is None:
        return
    record: dict[str, Any] = {
        "name": name,
        "status": "running",
        "kind": prepared.stage.kind,
        "fingerprint": prepared.fingerprint,
        "student": prepared.stage.models[0],
        "depends": dict(prepared.depends),
        **_surroundings(),
    }
    if isinstance(prepared, PreparedTraining):
        threads = use_free_cores(earlier.get("threads"))
        record |= _train(folder, prepared, record | {"threads": threads}, display)
    else:
        record |= broadcast_from_main(lambda: _make(folder, prepared, record))
    record |= {"status": "done"}
    if is_main_process():
        write_stage(path, record | {"files": _written(path)})
        _drop_checkpoints(path)  # not before the stage is known to be done: they are all there is
    display.done(name, _told(record))


def _to_go_on_from(
    folder: RunFolder, prepared: Prepared, display: Display
) -> dict[str, Any] | None:
    """What an interrupted run wrote of the stage, empty at its start; None where it is done.

    The result of an earlier recipe is moved out of the way.
    """
    name, path = prepared.name, folder.stage(prepared.name)
    earlier = read_stage(path)
    same = earlier.get("fingerprint") == prepared.fingerprint
    if same and earlier.get("status") == "done" and (path / "model").is_dir():
        check_whole(path, earlier, display)
        _drop_checkpoints(path)
        word = "trained" if isinstance(prepared, PreparedTraining) else "made"
        display.done(name, f"already {word} ({_told(earlier)})")
        return None
    if path.exists() and not same:
        kept = set_aside(path)
        why = "what it depends on has changed" if earlier else "its folder has no stage.json"
        changed = _changed(earlier, prepared)
        named = f" ({'; '.join(changed)})" if changed else ""
        display.line(f"{name}: {why}{named}; the earlier result is kept in {kept}")
    if same and by_step(path / "checkpoints") and (apart := moved(earlier, _surroundings())):
        display.line(f"{name}: goes on with {', '.join(apart)}; that may round differently")
    path.mkdir(parents=True, exist_ok=True)
    return earlier if same else {}


def _check_begun(folder: RunFolder, stages: Sequence[Prepared]) -> None:
    """Refuse to leave a half-trained stage behind for a recipe that may not be meant.

    Raises:
        InputError: says what has changed, and how to go on.
    """
    for prepared in stages:
        path = folder.stage(prepared.name)
        record, begun = read_stage(path), by_step(path / "checkpoints")
        same = record.get("fingerprint") == prepared.fingerprint
        if same or record.get("status") != "running" or not begun:
            continue
        raise InputError(
            "the stage is half trained, and what it depends on has changed since",
            where=str(path),
            found="; ".join(_changed(record, prepared)) or None,
            do=f"put that back to go on from {begun[-1].name}; "
            f"or move {path} away to train it anew",
        )


def _changed(record: Mapping[str, Any], prepared: Prepared) -> list[str]:
    """What has changed since a stage was recorded, as far as the record tells."""
    return changes(record["depends"], prepared.depends) if "depends" in record else []


def _surroundings() -> dict[str, Any]:
    """What a stage is run by and does not depend on."""
    return {"ranks": world_size(), "versions": _versions()}


def _written(path: Path) -> dict[str, dict[str, Any]]:
    """What a finished stage consists of; its model's card is rewritten, and edited by people."""
    parts = [part for part in (path / "model").rglob("*") if part.name != "README.md"]
    return file_manifest(path, [*parts, path / "metrics.jsonl"])


def _drop_checkpoints(path: Path) -> None:
    shutil.rmtree(path / "checkpoints", ignore_errors=True)


def _make(folder: RunFolder, prepared: Prepared, record: Mapping[str, Any]) -> dict[str, Any]:
    """Make a model of others; what `stage.json` says of it."""
    from dominie.models.export import prepare_export
    from dominie.models.merging import merge_models
    from dominie.models.upcycling import upcycle_model

    stage, path = prepared.stage, folder.stage(prepared.name)
    write_stage(path, record)
    scratch = path / ".writing-model"
    shutil.rmtree(scratch, ignore_errors=True)
    started = time.perf_counter()
    with writing(scratch):
        models = {name: folder.model(name) for name in stage.models}
        if isinstance(prepared, PreparedUpcycle):
            settings = prepared.stage.upcycle
            parameters = upcycle_model(settings, models, scratch, rows=prepared.rows or ())
        else:
            assert isinstance(stage, MergeStage)
            parameters = merge_models(stage.merge, models, scratch)
        prepared.tokenizer.save_pretrained(scratch)
        prepare_export(scratch, prepared.tokenizer)
        publish(scratch, path / "model")
    seconds = round(time.perf_counter() - started, 1)
    return {"models": stage.models, "parameters": parameters, "seconds": seconds}


def _train(
    folder: RunFolder, prepared: PreparedTraining, record: dict[str, Any], display: Display
) -> dict[str, Any]:
    """Train a stage; what `stage.json` says of it."""
    from dominie.teachers.cached import CachedTeacher
    from dominie.training.callbacks import StepProgress
    from dominie.training.metric_sums import MetricsLog
    from dominie.training.train_stage import shared_minds, train_stage

    stage, path = prepared.stage, folder.stage(prepared.name)
    lessons = prepared.lessons
    record["teachers"] = {source: stage.teacher_on(source) for source in stage.active}
    if is_main_process():
        write_stage(path, record | {"data": {}})
    live = {lesson.teacher for lesson in lessons if lesson.cache is None}
    teachers = {name: folder.teacher(name) for name in stage.models if name in live}
    caches = filled_caches(folder, prepared, display)
    student = folder.model(stage.student)
    shared = shared_minds(student, teachers, stage.train)
    if shared.adapters:
        display.line(
            f"{prepared.name}: {' and '.join(shared.adapters)} and the student share one base; "
            "its weights are held once"
        )
    for name, why in shared.apart.items():
        display.line(f"{prepared.name}: {name} is loaded beside the student's base: {why}")
    with display.progress(prepared.name) as advance:
        trained = train_stage(
            path,
            student=student,
            tokenizer=prepared.tokenizer,
            teachers=teachers,
            lessons=lessons,
            settings=stage.train,
            caches={name: CachedTeacher(cache) for name, cache in caches.items()},
            callbacks=[StepProgress(advance)],
        )
    lines = MetricsLog(path / "metrics.jsonl").read()
    last: Any = next((line["evaluation"] for line in reversed(lines) if "evaluation" in line), {})
    told = dataclasses.asdict(trained)
    token_shares = told.pop("token_shares")
    return record | {
        **told,
        "data": {source: _counts(prepared, source, token_shares) for source in stage.active},
        "final": {"evaluation": last},
    }


def _counts(
    prepared: PreparedTraining, source: str, token_shares: Mapping[str, float]
) -> dict[str, Any]:
    """What a stage read, kept and used of a source."""
    rows, shares = prepared.sources[source], prepared.stage.data
    return {
        **dataclasses.asdict(rows.summary),
        "train": len(rows.train),
        "validation": len(rows.validation),
        "test": len(rows.test),
        "share": shares[source].share / sum(shares[s].share for s in prepared.stage.active),
        "token_share": token_shares.get(source, 0.0),
    }


def _told(record: Mapping[str, Any]) -> str:
    """One line about a finished stage."""
    parts = [f"{record['seconds']:.0f} s", f"{record['parameters'] / 1e6:.2f}M parameters"]
    if record["kind"] == "train":
        counted = f"{record['supervised_tokens']:,} supervised tokens"
        return ", ".join([f"{record['steps']} steps", counted, *parts])
    return ", ".join([f"{record['kind']} of {' and '.join(record['models'])}", *parts])


def _versions() -> dict[str, str]:
    packages = ("dominie", "torch", "transformers", "accelerate", "peft", "datasets")
    return {package: importlib.metadata.version(package) for package in packages}
