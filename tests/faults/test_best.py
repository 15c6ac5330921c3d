"""`keep: best`, `patience`, `max_spike`: a stage that was cut off, damaged or moved ends alike."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from faults import damage
from stages import KILLED, Stages, copied_to, files, older, same

from dominie.training.checkpoints import by_step

HOWS = ("flip", "cut", "empty", "delete", "older")
QUICK = [("best", "saved"), ("patience", 4)]  # in `make test`
CUTS = [(kind, killed) for kind, whens in KILLED.items() for killed in whens]


@pytest.fixture(scope="session")
def stages(tmp_path_factory) -> Stages:
    return Stages.begin(tmp_path_factory.mktemp("stages"))


def strike(stages: Stages, target: Path, kind: str, killed: int | str, file: Path, how: str):
    """Damage a file, train on; whether it came to the same end, None if there is no such fault."""
    cut = stages.cut(kind, killed)
    content, source = (cut / file).read_bytes(), older(cut, file)
    if how == "older":
        if source is None or not source.exists() or source.read_bytes() == content:
            return None
    elif not content and how != "delete":
        return None
    moved = (len(str(file)) + len(how)) % 2 == 1  # every other one
    work = copied_to(cut, target, moved=moved)
    if how == "older":
        shutil.copyfile(source, work / file)
    else:
        damage(work / file, how)
    checkpoint = file.parts[1] if len(file.parts) > 1 else file.name
    ended = same(stages.end(kind, work), stages.good(kind), checkpoint)
    if not ended:  # put back, it goes on
        (work / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(cut / file, work / file)
        assert stages.end(kind, work) == stages.good(kind)
    shutil.rmtree(work)
    return ended


@pytest.mark.parametrize(
    ("kind", "killed"),
    [c if c in QUICK else pytest.param(*c, marks=pytest.mark.full) for c in CUTS],
)
@pytest.mark.parametrize("moved", [pytest.param(False, marks=pytest.mark.full), True])
def test_cut_off_and_moved(stages, tmp_path, tally, kind, killed, moved):
    work = copied_to(stages.cut(kind, killed), tmp_path, moved=moved)
    assert stages.end(kind, work) == stages.good(kind)
    tally("stage cut off" + (" and moved" if moved else ""), same=True)


@pytest.mark.full
@pytest.mark.parametrize("how", HOWS)
@pytest.mark.parametrize(("kind", "killed"), CUTS)
def test_every_file_damaged(stages, tmp_path, tally, kind, killed, how):
    for file in files(stages.cut(kind, killed)):
        ended = strike(stages, tmp_path, kind, killed, file, how)
        if ended is not None:
            tally(f"{kind}: {how}", same=ended)


def exchange(work: Path, cut: Path, other: Path, change: str) -> list[str]:
    """Give each checkpoint another's place; the names of those that are not what they were."""
    checkpoints = work / "checkpoints"
    names = [path.name for path in by_step(checkpoints)]
    what, *named = change.split()
    of = [names[int(number)] for number in named]
    if what == "copied":
        shutil.rmtree(checkpoints / of[1])
        shutil.copytree(checkpoints / of[0], checkpoints / of[1])
        return of[1:]
    if what == "swapped":
        for one, two in (of, of[::-1]):
            shutil.rmtree(checkpoints / one)
            shutil.copytree(cut / "checkpoints" / two, checkpoints / one)
    elif what == "renamed":
        (checkpoints / of[0]).rename(checkpoints / "checkpoint-99")
    elif what == "foreign":
        theirs = by_step(other / "checkpoints")
        step = next((path for path in theirs if path.name == of[0]), theirs[0])
        shutil.rmtree(checkpoints / of[0])
        shutil.copytree(step, checkpoints / of[0])
    elif what == "half":
        (checkpoints / ".writing").mkdir(exist_ok=True)
        (checkpoints / of[0]).rename(checkpoints / ".writing" / of[0])
    elif what == "emptied":
        shutil.rmtree(checkpoints / of[0])
        (checkpoints / of[0]).mkdir()
    elif what == "lost":
        for name in of:
            shutil.rmtree(checkpoints / name)
    return of


EXCHANGES = (
    *(f"copied {a} {b}" for a in range(3) for b in range(3) if a != b),
    *(f"swapped {a} {b}" for a in range(3) for b in range(a)),
    *(
        f"{what} {a}"
        for what in ("renamed", "foreign", "half", "emptied", "lost")
        for a in range(3)
    ),
    *("lost 0 1", "lost 1 2", "lost 0 1 2"),
)
FEW = {"copied 2 0", "foreign 0", "foreign 2", "lost 0"}


@pytest.mark.parametrize(
    ("kind", "killed", "change"),
    [
        pytest.param(*cut, c, marks=() if cut == QUICK[0] and c in FEW else pytest.mark.full)
        for cut in CUTS
        if cut != ("best", 2)
        for c in EXCHANGES
    ],
)
def test_checkpoints_exchanged(stages, tmp_path, tally, kind, killed, change):
    """The oldest of the three is the best one."""
    cut, other = stages.cut(kind, killed), stages.cut(kind, killed, seed=1)
    if int(max(change.split()[1:])) >= len(by_step(cut / "checkpoints")):
        pytest.skip("there are fewer checkpoints")
    work = copied_to(cut, tmp_path, moved=False)
    of = exchange(work, cut, other, change)
    ended = same(stages.end(kind, work), stages.good(kind))
    if not ended:
        told = stages.end(kind, work)["refused"]
        assert any(name in told for name in of), told
    tally(f"{kind}: checkpoints {change.split()[0]}", same=ended)
