"""Checkpoints: verified by content, rotated without losing the last good one, free of pickles."""

from __future__ import annotations

import json
import random
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from dominie.training.checkpoints import (
    drop_old,
    fault,
    has_state,
    newest_checkpoint,
    random_states,
    read_state,
    restore_random_states,
    seal,
    write_state,
)


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


def test_a_state_comes_back_bit_for_bit(tmp_path):
    shared = torch.randn(3)
    state = {
        "state": {0: {"step": torch.tensor(3.0), "exp_avg": torch.randn(2, 3).T}, 7: {}},
        "param_groups": [{"lr": 0.1 + 0.2, "betas": (0.9, 0.999), "name": None, "on": True}],
        "twice": [shared, shared],
        "none": torch.zeros(0, dtype=torch.bfloat16),
    }
    write_state(tmp_path / "optimizer", state)
    assert has_state(tmp_path / "optimizer")
    found = read_state(tmp_path / "optimizer")
    assert list(found["state"]) == [0, 7]
    assert found["param_groups"] == state["param_groups"]
    assert torch.equal(found["state"][0]["exp_avg"], state["state"][0]["exp_avg"])
    assert found["none"].dtype == torch.bfloat16
    assert all(torch.equal(tensor, shared) for tensor in found["twice"])


@pytest.mark.parametrize("state", [{"a": {1, 2}}, {(1, 2): 3}, [SimpleNamespace()]])
def test_what_is_no_state_is_refused(tmp_path, state):
    with pytest.raises(TypeError):
        write_state(tmp_path / "x", state)


def test_generators_go_on_where_they_were(tmp_path):
    np.random.standard_normal()  # leaves half a pair behind
    write_state(tmp_path / "random", random_states())
    drawn = [random.random(), np.random.standard_normal(3).tolist(), torch.rand(3).tolist()]
    restore_random_states(read_state(tmp_path / "random"))
    assert drawn == [random.random(), np.random.standard_normal(3).tolist(), torch.rand(3).tolist()]
