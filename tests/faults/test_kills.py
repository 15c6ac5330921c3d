"""Killed at any moment, a run comes to the same end, and makes no more steps again than it must."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from faults import INTERVAL, STEPS, Nursery, copied, wrong

#: In `make test`: the moments at which most is at stake, by how they begin.
MOMENTS = (
    ("kill", "open rows/"),
    ("kill", "rename first/.stage.json"),
    ("kill", "rename first/checkpoints/.writing/checkpoint-2"),
    ("torn", "fsync first/checkpoints/.writing/checkpoint-4/optimizer.pt"),
    ("kill", "remove first/checkpoints/checkpoint-4/"),
    ("kill", "rename cache/"),
    ("torn", "fsync second/.writing-model/model.safetensors"),
    ("kill", "rename merged/.writing-model"),
    ("kill", "rename evaluation/second/.t.json"),
)
PARTS = 12


def strike(nursery: Nursery, inputs: Path, folder: Path, good: dict, at: int, how: str) -> int:
    """Kill a run, run it again, and compare; the steps that it made a second time."""
    work = copied(inputs, folder / "work")
    killed = nursery.run(work, at=at, how=how)
    assert killed.status == -9, killed.said
    again = nursery.run(work)
    moment = killed.moments[-1]
    assert again.status == 0, (moment, again.said)
    assert not wrong(again, work / "runs" / "tiny", good), moment
    lost = killed.steps + again.steps - STEPS
    assert 0 <= lost <= INTERVAL, (moment, lost)
    shutil.rmtree(work)
    return lost


@pytest.mark.parametrize(("how", "begins"), MOMENTS)
def test_killed_when_most_is_at_stake(nursery, inputs, undisturbed, tally, tmp_path, how, begins):
    moments = undisturbed.ended.moments
    at = next(at for at, moment in enumerate(moments, 1) if moment.startswith(begins))
    tally(how, strike(nursery, inputs, tmp_path, undisturbed.outcome, at, how))


@pytest.mark.full
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("part", range(PARTS))
def test_killed_at_every_moment(nursery, inputs, undisturbed, tally, tmp_path, part):
    """At every boundary, but for the many files of a folder that is removed: at one in three."""
    moments = undisturbed.ended.moments
    kills = [
        at for at, moment in enumerate(moments, 1) if at % 3 == 0 or not moment.startswith("remove")
    ]
    for at in kills[part::PARTS]:
        lost = strike(nursery, inputs, tmp_path, undisturbed.outcome, at, "kill")
        tally("kill", lost)


@pytest.mark.full
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("part", range(PARTS // 3))
def test_killed_with_half_a_file_written(nursery, inputs, undisturbed, tally, tmp_path, part):
    moments = undisturbed.ended.moments
    writes = [at for at, moment in enumerate(moments, 1) if moment.startswith("fsync")]
    for at in writes[part :: PARTS // 3]:
        lost = strike(nursery, inputs, tmp_path, undisturbed.outcome, at, "torn")
        tally("torn", lost)
