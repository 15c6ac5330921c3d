"""Stages of the version before: finished ones are kept, a changed half-trained one is refused."""

from __future__ import annotations

import shutil
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from dominie.core.display import Display
from dominie.core.errors import InputError
from dominie.core.io import file_manifest
from dominie.recipe import load_recipe
from dominie.stages.run_folder import RunFolder, write_stage
from dominie.stages.run_stages import _check_begun, _finished, _interrupted, run_stage
from dominie.stages.stage_kind import Prepared, stage_kind

MINI = Path(__file__).parents[1] / "recipes" / "mini.yaml"

#: What version 0.1.0 wrote, but for versions, dependencies and data.
TRAINED: dict[str, Any] = {
    "name": "sft", "status": "done", "kind": "train", "fingerprint": "4f395049770c07ff",
    "student": "toyworld:student", "ranks": 1, "threads": 1, "teachers": {"general": None},
    "steps": 6, "supervised_tokens": 194, "seconds": 0.7, "parameters": 272736,
    "trainable_parameters": 272736, "data": {}, "final": {"evaluation": {}},
}  # fmt: skip
MERGED: dict[str, Any] = {
    "name": "merged", "status": "done", "kind": "merge", "fingerprint": "c43663491d1b26d8",
    "student": "distill", "ranks": 1, "models": ["distill", "expert"], "parameters": 272736,
    "seconds": 0.0,
}  # fmt: skip


def stage_folder(runs: Path, record: dict[str, Any]) -> tuple[RunFolder, Prepared]:
    """A finished stage as it was written, and the same stage prepared now."""
    recipe = load_recipe(MINI)
    folder = RunFolder(recipe, runs)
    path = folder.stage(record["name"])
    (path / "model").mkdir(parents=True)
    (path / "model" / "config.json").write_text("{}")
    write_stage(path, record | {"files": file_manifest(path)})
    stage = stage_kind(recipe, record["name"])
    return folder, Prepared(record["name"], stage, None, record["fingerprint"])


@pytest.mark.parametrize(
    ("record", "line"),
    [
        (TRAINED, "sft already trained (6 steps, 194 supervised tokens, 1 s, 0.27M parameters)"),
        (MERGED, "merged already made (merge of distill and expert, 0 s, 0.27M parameters)"),
    ],
)
def test_a_finished_stage_is_kept(tmp_path, record, line):
    folder, prepared = stage_folder(tmp_path, record)
    out = StringIO()
    run_stage(folder, prepared, Display(Console(file=out, width=200, color_system=None)))
    assert line in out.getvalue()


def test_a_changed_stage_that_is_half_trained_is_refused(tmp_path):
    depends = {"train.steps": 6}
    folder, prepared = stage_folder(tmp_path, TRAINED | {"status": "running", "depends": depends})
    (folder.stage("sft") / "checkpoints" / "checkpoint-2").mkdir(parents=True)
    _check_begun(folder, [prepared])
    changed = Prepared("sft", prepared.stage, None, "0" * 16, depends={"train.steps": 8})
    with pytest.raises(InputError, match="half trained, and what it depends on") as refused:
        _check_begun(folder, [changed])
    assert refused.value.found == "train.steps: 6 before, 8 now"


def test_a_damaged_stage_of_another_run_is_not_taken(tmp_path):
    said = StringIO()
    display = Display(Console(file=said, width=200))
    for run in ("a", "b"):
        model = tmp_path / run / "s" / "model"
        model.mkdir(parents=True)
        (model / "config.json").write_text("{}")
        files = file_manifest(model.parent)
        record = {"status": "done", "fingerprint": "f", "files": files}
        write_stage(model.parent, record)
    (tmp_path / "a" / "s" / "model" / "config.json").write_text("[]")
    assert _finished(tmp_path, "f", display) == tmp_path / "b" / "s"
    assert "not taken, it is damaged: model/config.json" in said.getvalue()


def test_an_empty_stage_folder_is_not_kept_as_an_earlier_result(tmp_path):
    folder, prepared = stage_folder(tmp_path, MERGED)
    shutil.rmtree(folder.stage("merged"))
    folder.stage("merged").mkdir()
    assert _interrupted(folder, prepared, Display()) == {}
    assert not (folder.path / ".replaced").exists()
