"""Full, read-only and vanished places: one message, and the next run comes to the same end."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from faults import INTERVAL, STEPS, complaint, copied, wrong

PARTS = 4


@pytest.fixture
def small_disk(tmp_path) -> Iterator[Path]:
    """A file system in memory of which the tests set the size; skipped where none can be had."""
    place = tmp_path / "disk"
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=64m", "none", str(place)]
    try:
        mounted = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        pytest.skip("there is no mount here")
    if mounted.returncode:
        pytest.skip(f"a tmpfs cannot be mounted: {mounted.stderr.strip()}")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


def resize(place: Path, kilobytes: int) -> None:
    command = ["mount", "-o", f"remount,size={kilobytes}k", str(place)]
    subprocess.run(command, check=True, capture_output=True)


def filled(nursery, inputs: Path, place: Path, undisturbed, kilobytes: int, tally) -> int:
    """Run on a disk of so many kilobytes, then on a larger one; the status of the first run."""
    work = copied(inputs, place / "work")
    resize(place, kilobytes)
    full = nursery.run(work)
    assert full.status == 0 or not complaint(full), (kilobytes, full.said)
    resize(place, 65536)
    again = nursery.run(work)
    assert again.status == 0, again.said
    assert not wrong(again, work / "runs" / "tiny", undisturbed.outcome), kilobytes
    lost = full.steps + again.steps - STEPS
    assert lost <= INTERVAL, kilobytes
    if full.status:
        tally("disk full", lost)
    shutil.rmtree(work)
    return full.status


def test_a_disk_that_is_full(nursery, inputs, small_disk, undisturbed, tally):
    assert filled(nursery, inputs, small_disk, undisturbed, 8000, tally) == 1


@pytest.mark.full
@pytest.mark.timeout(1800)
def test_disks_of_many_sizes(nursery, inputs, small_disk, undisturbed, tally):
    sizes = range(1600, 20000, 460)
    ended = [filled(nursery, inputs, small_disk, undisturbed, size, tally) for size in sizes]
    assert sum(map(bool, ended)) >= 15, "many are too small"
    assert 0 in ended, "the last is large enough"


@pytest.mark.full
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("part", range(PARTS))
def test_no_space_at_any_boundary(nursery, inputs, undisturbed, tally, tmp_path, part):
    """From some boundary on nothing can be created or synced any more."""
    moments = undisturbed.ended.moments
    writes = [n for n, m in enumerate(moments, 1) if m.startswith(("open", "fsync", "mkdir"))]
    for at in writes[2 * part :: 2 * PARTS]:
        work = copied(inputs, tmp_path / "work")
        full = nursery.run(work, at=at, how="full")
        assert full.status == 0 or not complaint(full), (moments[at - 1], full.said)
        again = nursery.run(work)
        assert again.status == 0, (moments[at - 1], again.said)
        assert not wrong(again, work / "runs" / "tiny", undisturbed.outcome), moments[at - 1]
        lost = full.steps + again.steps - STEPS
        assert lost <= INTERVAL, (moments[at - 1], lost)
        tally("no space", lost)
        shutil.rmtree(work)


@pytest.mark.parametrize(
    "begins",
    [
        "mkdir first/checkpoints/",
        pytest.param("open second/.writing-model", marks=pytest.mark.full),
    ],
)
def test_a_folder_that_vanishes(nursery, inputs, undisturbed, tally, tmp_path, begins):
    work = copied(inputs, tmp_path / "work")
    moments = enumerate(undisturbed.ended.moments, 1)
    at = next(n for n, moment in moments if moment.startswith(begins))
    ended = nursery.run(work, at=at, how="vanish")
    assert not complaint(ended), ended.said
    run = work / "runs" / "tiny"
    shutil.rmtree(run, ignore_errors=True)  # what was begun anew in its place
    run.with_name("tiny-gone").rename(run)
    again = nursery.run(work)
    assert not wrong(again, run, undisturbed.outcome)
    assert ended.steps + again.steps - STEPS <= INTERVAL
    tally("folder vanished", ended.steps + again.steps - STEPS)


def test_a_folder_that_cannot_be_written(nursery, small_disk, inputs, undisturbed, tally):
    """Read-only from the start; and when a run would go on."""
    work = copied(inputs, small_disk / "work")
    begins = "rename second/checkpoints/.writing/checkpoint-2"
    at = undisturbed.ended.moments.index(begins) + 1
    assert nursery.run(work, at=at).status == -9
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    ended = nursery.run(work)
    assert not complaint(ended, ["runs/tiny"]), ended.said
    subprocess.run(["mount", "-o", "remount,rw", str(small_disk)], check=True)
    assert not wrong(nursery.run(work), work / "runs" / "tiny", undisturbed.outcome)
    tally("read-only")
