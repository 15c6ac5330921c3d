"""Bits flipped, files cut, emptied, deleted: the same end, or one message that names the file."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from faults import WHEN, copied, damage, wrong

HOWS = ("flip", "cut", "empty", "delete")

#: In `make test`: when, what kind of file, how.
FEW = (
    ("prepared", "rows/*/train.arrow", "flip"),
    ("cached", "cache/*/shard-*.arrow", "flip"),
    ("training", "second/checkpoints/checkpoint-2/optimizer.pt", "flip"),
    ("training", "second/metrics.jsonl", "flip"),
    ("done", "second/model/model.safetensors", "flip"),
    ("done", "first/stage.json", "flip"),
    ("done", "evaluation/second/t.json", "flip"),
)


def check(nursery, state: Path, target: Path, good: dict, file: Path, how: str) -> None:
    work = copied(state, target / "work")
    path = work / "runs" / "tiny" / file
    damage(path, how)
    ended = nursery.run(work)
    assert not wrong(ended, work / "runs" / "tiny", good, file.name), (how, file)
    shutil.rmtree(work)


@pytest.mark.parametrize(("when", "pattern", "how"), FEW)
def test_damage(nursery, state, undisturbed, tally, tmp_path, when, pattern, how):
    run = state(when) / "runs" / "tiny"
    file = next(path for path in sorted(run.glob(pattern))).relative_to(run)
    check(nursery, state(when), tmp_path, undisturbed.outcome, file, how)
    tally(how)


@pytest.mark.full
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("how", HOWS)
@pytest.mark.parametrize("when", WHEN)
def test_every_file_damaged(nursery, state, undisturbed, tally, tmp_path, when, how):
    run = state(when) / "runs" / "tiny"
    for path in sorted(run.rglob("*")):
        if path.is_file() and (path.stat().st_size or how == "delete"):
            check(nursery, state(when), tmp_path, undisturbed.outcome, path.relative_to(run), how)
            tally(how)
