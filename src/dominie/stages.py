"""Runs a recipe's stages in dependency order: skips what is done, resumes what was cut off."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dominie.data.rows import PreparedSource, prepare
from dominie.data.tokenizers import tokenizer_fingerprint
from dominie.display import Display
from dominie.fingerprints import model_fingerprint, stage_fingerprint
from dominie.models.agreement import check_same_tokens
from dominie.models.loading import load_tokenizer
from dominie.recipe import Stage, dump_recipe
from dominie.recipe.check import stage_order
from dominie.run_folder import RunFolder, read_stage, write_stage
from dominie.threads import use_free_cores


@dataclass(frozen=True)
class Prepared:
    """A stage whose data are ready and whose models are known to fit, before any is loaded.

    Attributes:
        name: of the stage.
        stage: its part of the recipe.
        sources: the sources it learns from, then those it only watches.
        fingerprint: of everything its model depends on.
    """

    name: str
    stage: Stage
    sources: Mapping[str, PreparedSource]
    fingerprint: str


def prepare_stages(folder: RunFolder, display: Display) -> list[Prepared]:
    """Read and tokenise all data and compare all tokenizers, before any stage is trained.

    Returns:
        The stages, each after those it learns from.

    Raises:
        InputError: data, templates, tokenizers or models that cannot be used.
    """
    recipe = folder.recipe
    data = _PreparedData(folder, display)
    fingerprints: dict[str, str] = {}
    prepared = []
    for name in stage_order(recipe, where=recipe.name):
        stage, sources = recipe.stages[name], data.of_stage(name)
        _check_tokens(folder, name)
        for model in stage.models:
            if model not in recipe.stages:
                fingerprints.setdefault(model, model_fingerprint(folder.model(model)))
        rows = {source: sources[source].train.digest for source in stage.active}
        fingerprints[name] = stage_fingerprint(recipe, name, rows=rows, models=fingerprints)
        prepared.append(Prepared(name, stage, sources, fingerprints[name]))
    return prepared


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
    if earlier and not same:
        kept = _set_aside(path)
        display.line(
            f"{name}: what it depends on has changed; the earlier result is kept in {kept}"
        )
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
    from dominie.training.lessons import Lessons
    from dominie.training.progress import StepProgress
    from dominie.training.records import Records
    from dominie.training.stage import train_stage

    stage, path = prepared.stage, folder.stage(prepared.name)
    taught = stage.active
    watched = [
        name
        for name, source in prepared.sources.items()
        if name not in taught and len(source.validation)
    ]
    limit = stage.train.evaluate_rows
    lessons = [
        Lessons(
            name=source,
            train=prepared.sources[source].train,
            validation=prepared.sources[source].validation.first(limit),
            share=stage.data[source].share,
            terms=stage.loss_on(source),
            teacher=stage.teacher_on(source),
        )
        for source in taught
    ] + [
        Lessons(
            name=source,
            train=(),
            validation=prepared.sources[source].validation.first(limit),
            share=0.0,
        )
        for source in watched
    ]
    teachers = {
        name: folder.model(name)
        for name in stage.models
        if name in {lesson.teacher for lesson in lessons}
    }
    with display.progress(prepared.name) as advance:
        trained = train_stage(
            path,
            student=folder.model(stage.student),
            teachers=teachers,
            lessons=lessons,
            settings=stage.train,
            callbacks=[StepProgress(advance)],
        )
    records = Records(path / "metrics.jsonl").read()
    return trained, {
        "evaluation": next((r["evaluation"] for r in reversed(records) if "evaluation" in r), {})
    }


class _PreparedData:
    """Tokenised sources for each tokenizer and length, made once and told about once."""

    def __init__(self, folder: RunFolder, display: Display) -> None:
        self.folder, self.display = folder, display
        self._made: dict[tuple[str, int], dict[str, PreparedSource]] = {}

    def of_stage(self, name: str) -> dict[str, PreparedSource]:
        """The sources of a stage, those it learns from first; the rest may be watched."""
        recipe = self.folder.recipe
        stage = recipe.stages[name]
        tokenizer = load_tokenizer(self.folder.model(self.folder.root(stage.student)))
        key = (tokenizer_fingerprint(tokenizer), stage.train.max_length)
        if key not in self._made:
            self._made[key] = self._prepare(tokenizer, stage.train.max_length)
        made = self._made[key]
        return {
            source: made[source]
            for source in [*stage.active, *(s for s in made if s not in stage.active)]
        }

    def _prepare(self, tokenizer: Any, max_length: int) -> dict[str, PreparedSource]:
        folder = self.folder
        made = prepare(
            {name: folder.source(name) for name in folder.recipe.data},
            tokenizer,
            max_length=max_length,
            cache=folder.rows,
        )
        for name, source in made.items():
            self.display.line(source.summary.line(name))
        return made


def _check_tokens(folder: RunFolder, name: str) -> None:
    """Refuse a teacher of another tokenizer before anything is trained."""
    stage = folder.recipe.stages[name]
    root = folder.root(stage.student)
    for teacher in stage.models[1:]:
        if (other := folder.root(teacher)) != root:
            check_same_tokens(
                load_tokenizer(folder.model(root)),
                load_tokenizer(folder.model(other)),
                where=f"stages.{name}, teacher {teacher}",
            )


def _set_aside(path: Path) -> Path:
    """Move a stage's folder out of the way, so that no changed recipe costs what was trained."""
    old = read_stage(path).get("fingerprint", "unknown")
    kept = path.parent / ".replaced" / f"{path.name}-{old}"
    shutil.rmtree(kept, ignore_errors=True)
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
