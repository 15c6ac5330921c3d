"""Runs a recipe's stages in dependency order: skips what is done, resumes what was cut off."""

from __future__ import annotations

import dataclasses
import importlib.metadata
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dominie.display import Display
from dominie.preparation import Prepared, prepare_stages
from dominie.recipe import dump_recipe
from dominie.run_folder import RunFolder, read_stage, write_stage
from dominie.threads import use_free_cores


def run_stages(folder: RunFolder, display: Display) -> dict[str, str]:
    """Run what is not done.

    Returns:
        The fingerprint of every stage.
    """
    prepared = prepare_stages(folder, display)
    (folder.path / "recipe.yaml").write_text(dump_recipe(folder.recipe), encoding="utf-8")
    for stage in prepared:
        run_stage(folder, stage, display)
    return {stage.name: stage.fingerprint for stage in prepared}


def run_stage(folder: RunFolder, prepared: Prepared, display: Display) -> None:
    """Train one stage, or say why it need not be."""
    name, path = prepared.name, folder.stage(prepared.name)
    earlier = read_stage(path)
    same = earlier.get("fingerprint") == prepared.fingerprint
    if same and earlier.get("status") == "done" and (path / "model" / "config.json").is_file():
        display.done(name, f"already trained ({_told(earlier)})")
        return
    if path.exists() and not same:
        kept = _set_aside(path)
        why = "what it depends on has changed" if earlier else "its folder has no stage.json"
        display.line(f"{name}: {why}; the earlier result is kept in {kept}")
    threads = use_free_cores(earlier.get("threads") if same else None)
    record: dict[str, Any] = {
        "name": name,
        "status": "running",
        "kind": "train",
        "fingerprint": prepared.fingerprint,
        "student": prepared.stage.student,
        "teachers": {source: prepared.stage.teacher_on(source) for source in prepared.stage.active},
        "threads": threads,
        "data": {},
    }
    path.mkdir(parents=True, exist_ok=True)
    write_stage(path, record)
    trained, last = _train(folder, prepared, display)
    shares = prepared.stage.data
    whole = sum(shares[source].share for source in prepared.stage.active)
    for source in prepared.stage.active:
        record["data"][source] = {
            **dataclasses.asdict(prepared.sources[source].summary),
            "train": len(prepared.sources[source].train),
            "validation": len(prepared.sources[source].validation),
            "test": len(prepared.sources[source].test),
            "share": shares[source].share / whole,
            "token_share": trained.token_shares.get(source, 0.0),
        }
    record |= {
        "status": "done",
        **dataclasses.asdict(trained),
        "final": last,
        "versions": _versions(),
    }
    del record["token_shares"]
    write_stage(path, record)
    display.done(name, _told(record))


def _train(folder: RunFolder, prepared: Prepared, display: Display) -> tuple[Any, dict[str, Any]]:
    from dominie.training.progress import StepProgress
    from dominie.training.records import Records
    from dominie.training.stage import train_stage

    stage, path = prepared.stage, folder.stage(prepared.name)
    lessons = prepared.lessons
    teachers = {
        name: folder.model(name)
        for name in stage.models
        if name in {lesson.teacher for lesson in lessons}
    }
    with display.progress(prepared.name) as advance:
        trained = train_stage(
            path,
            student=folder.model(stage.student),
            tokenizer=prepared.tokenizer,
            teachers=teachers,
            lessons=lessons,
            settings=stage.train,
            callbacks=[StepProgress(advance)],
        )
    records = Records(path / "metrics.jsonl").read()
    return trained, {
        "evaluation": next((r["evaluation"] for r in reversed(records) if "evaluation" in r), {})
    }


def _set_aside(path: Path) -> Path:
    """Move a stage's folder out of the way, so that no changed recipe costs what was trained."""
    name = f"{path.name}-{read_stage(path).get('fingerprint', 'unknown')}"
    kept = path.parent / ".replaced" / name
    number = 1
    while kept.exists():
        number += 1
        kept = kept.with_name(f"{name}-{number}")
    kept.parent.mkdir(exist_ok=True)
    path.rename(kept)
    return kept


def _told(record: Mapping[str, Any]) -> str:
    """One line about a finished stage."""
    return (
        f"{record['steps']} steps, {record['supervised_tokens']:,} supervised tokens, "
        f"{record['seconds']:.0f} s, {record['parameters'] / 1e6:.2f}M parameters"
    )


def _versions() -> dict[str, str]:
    packages = ("dominie", "torch", "transformers", "accelerate", "peft", "datasets")
    return {package: importlib.metadata.version(package) for package in packages}
