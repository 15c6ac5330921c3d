"""Checkpoints: verified by content, rotated without losing the last good one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dominie.training.checkpoints import drop_old, fault, newest_checkpoint, seal


def checkpoint(folder: Path, step: int) -> Path:
    path = folder / f"checkpoint-{step}"
    (path / "sub").mkdir(parents=True)
    (path / "weights").write_bytes(bytes(range(50)))
    (path / "sub" / "state").write_bytes(b"state")
    seal(path)
    return path


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda path: (path / "weights").unlink(), "weights is missing"),
        (lambda path: (path / "weights").write_bytes(b"short"), "weights is 5 bytes of 50"),
        (lambda path: (path / "sub" / "state").write_bytes(b"stats"), "not as it was written"),
        (lambda path: (path / "manifest.json").unlink(), "manifest.json is missing"),
        (lambda path: (path / "manifest.json").write_text("{"), "manifest.json cannot be read"),
        (lambda path: (path / "manifest.json").write_text("[]"), "manifest.json cannot be read"),
        (lambda path: (path / "manifest.json").write_text('{"files": 3}'), "cannot be read"),
    ],
)
def test_a_damaged_checkpoint_is_passed_over_and_why_is_said(tmp_path, damage, said):
    good, bad = checkpoint(tmp_path, 2), checkpoint(tmp_path, 10)
    assert newest_checkpoint(tmp_path) == (bad, {})
    damage(bad)
    newest, skipped = newest_checkpoint(tmp_path)
    assert newest == good
    assert said in skipped[bad]
    assert said in str(fault(bad))


@pytest.mark.parametrize("name", ["../../outside", "/etc/hostname", ""])
def test_a_manifest_that_leads_out_of_its_folder_is_none(tmp_path, name):
    folder = tmp_path / "checkpoint-1"
    folder.mkdir()
    (folder / "manifest.json").write_text(json.dumps({"files": {name: {"size": 1, "sha256": ""}}}))
    assert "manifest.json cannot be read" in str(fault(folder))


def test_rotation_keeps_the_newest_whole_ones_and_the_best(tmp_path):
    paths = {step: checkpoint(tmp_path, step) for step in (1, 2, 3, 4)}
    (paths[4] / "weights").unlink()
    drop_old(tmp_path, keep=2, spare=paths[1])
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "checkpoint-1", "checkpoint-2", "checkpoint-3"
    ]  # fmt: skip


def test_rotation_deletes_nothing_while_too_few_are_whole(tmp_path):
    paths = {step: checkpoint(tmp_path, step) for step in (1, 2, 3)}
    for step in (2, 3):
        (paths[step] / "weights").write_bytes(b"")
    drop_old(tmp_path, keep=2, spare=None)
    assert paths[1].is_dir()


def test_a_checkpoint_of_an_earlier_version_is_passed_over_in_one_message(tmp_path):
    kept, earlier = checkpoint(tmp_path, 2), checkpoint(tmp_path, 4)
    for name in ("optimizer.safetensors", "optimizer.json", "random-0.json"):
        (earlier / name).write_bytes(b"{}")
    seal(earlier)
    newest, skipped = newest_checkpoint(tmp_path)
    assert newest == kept, "or the optimiser would begin anew without a word"
    assert "earlier version of dominie" in skipped[earlier]
