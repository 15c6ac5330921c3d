"""Results of a run: every value of their files changed; told to who reads them, or the same."""

from __future__ import annotations

import copy
import json
import math
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from faults import damage
from run_folders import entry

from dominie.core.errors import InputError
from dominie.core.results_file import COMPARISONS, RESULTS, SEAL, read_results, write_results
from dominie.core.run_records import read_run
from dominie.report import compare_runs

FILES = (RESULTS, COMPARISONS, SEAL)
LOST = object()
CHANGES: dict[str, Callable[[Any], Any]] = {
    "a little more": lambda v: v + 1e-9 if isinstance(v, float) else _another(v),
    "another": lambda v: _another(v),
    "not finite": lambda v: math.nan,
    "null": lambda v: None,
    "a text": lambda v: f"{v}?",
    "a list": lambda v: [v],
    "an object": lambda v: {"score": v},
    "lost": lambda v: LOST,
}


def _another(value: Any) -> Any:
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return value * 0.5 + 0.125
    return {} if isinstance(value, dict) else [] if isinstance(value, list) else f"{value}x"


def write_run(run: Path, better: float) -> None:
    """A run of two models on two tasks, each made by a stage."""
    for stage in ("first", "second"):
        (run / stage).mkdir(parents=True, exist_ok=True)
        record = {"name": stage, "status": "done", "fingerprint": stage[0]}
        (run / stage / "stage.json").write_text(json.dumps(record))
    (run / "evaluation").mkdir(exist_ok=True)
    results = {
        model: {task: entry(score) for task in ("general", "domain")}
        for model, score in (("one", 0.4), ("two", better))
    }
    pair = {"difference": better - 0.4, "interval": [better - 0.5, better - 0.3]}
    seal = {
        "models": {
            "one": {"model": "first", "stages": {"first": "f"}},
            "two": {"model": "second", "stages": {"second": "s"}},
        },
        "tasks": {task: {"asks": task, "stages": {}} for task in ("general", "domain")},
    }
    write_results(run, results, "one", {"general": {"two": {"one": pair}}}, seal)


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> SimpleNamespace:
    folder = tmp_path_factory.mktemp("results")
    write_run(folder / "r", 0.6)
    write_run(folder / "earlier", 0.7)
    return SimpleNamespace(
        folder=folder / "r", earlier=folder / "earlier", good=read_all(folder / "r")
    )


def read_all(run: Path) -> dict[str, Any]:
    """What a run that goes on, the report and a comparison read; the message where they do not."""
    record = read_run(run)
    found: dict[str, Any] = {
        "results": repr(record.results),
        "differences": repr(record.differences),
        "baseline": repr(record.baseline),
        "notes": record.notes,
    }
    for name, read in (
        ("strict", lambda: read_results(run)),
        ("points", lambda: compare_runs([run], across=None, upwards=None, against=None)),
    ):
        try:
            found[name] = read()
        except InputError as error:
            found[name] = str(error)
    return found


def same(run: SimpleNamespace, work: Path, name: str) -> bool:
    """Whether all that is read is as it was; else the file is named by each that reads another."""
    found, good, words = read_all(work), run.good, (Path(name).name, "scored.json", RESULTS)
    if {**found, "notes": ()} == {**good, "notes": ()}:
        return True
    notes = [n for n in found["notes"] if any(word in n for word in words)]
    if any(found[part] != good[part] for part in ("results", "differences", "baseline")):
        assert notes, "the report shows something else without a word"
    for part in ("strict", "points"):
        told = found[part]
        if told != good[part] and isinstance(told, str):
            assert any(word in told for word in words), told
            assert "\n  do  " in told, told
    if found["strict"] != good["strict"]:
        assert isinstance(found["strict"], str), "silently other results"
    if found["points"] != good["points"] and not isinstance(found["points"], str):
        noted = [n for n in found["points"].notes if any(word in n for word in words)]
        assert noted, "a comparison shows something else without a word"
    return False


def leaves(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The places in an object, those that hold others too."""
    if path:
        yield path
    if isinstance(value, dict | list):
        for key in value if isinstance(value, dict) else range(len(value)):
            yield from leaves(value[key], (*path, key))


def changed(value: Any, path: tuple[Any, ...], how: str) -> Any:
    tree = copy.deepcopy(value)
    *way, last = path
    holder = tree
    for key in way:
        holder = holder[key]
    new = CHANGES[how](holder[last])
    if new is LOST:
        del holder[last]
    else:
        holder[last] = new
    return tree


@pytest.mark.parametrize(
    "how", [h if h == "another" else pytest.param(h, marks=pytest.mark.full) for h in CHANGES]
)
@pytest.mark.parametrize("name", FILES)
def test_every_value_changed(run, tmp_path, tally, name, how):
    tree = json.loads((run.folder / name).read_text())
    work = Path(shutil.copytree(run.folder, tmp_path / "r"))
    for path in list(leaves(tree))[:: 8 if how == "another" else 1]:
        (work / name).write_text(json.dumps(changed(tree, path, how), indent=1))
        tally(f"{Path(name).name}: a value {how}", same=same(run, work, name))


@pytest.mark.full
@pytest.mark.parametrize("how", ["flip", "cut", "empty", "delete", "earlier"])
@pytest.mark.parametrize("name", FILES)
def test_every_file_damaged(run, tmp_path, tally, name, how):
    for at in (0.02, 0.3, 0.6, 0.97) if how in ("flip", "cut") else (0.5,):
        work = Path(shutil.copytree(run.folder, tmp_path / "r"))
        if (name, how) == (RESULTS, "delete"):  # as if nothing was evaluated yet
            (work / name).unlink()
            assert any("no results.json" in note for note in read_run(work).notes)
            tally("results.json: delete", same=False)
            break
        if how == "earlier":
            shutil.copyfile(run.earlier / name, work / name)
        else:
            damage(work / name, how, at)
        tally(f"{Path(name).name}: {how}", same=same(run, work, name))
        shutil.rmtree(work)


@pytest.mark.full
@pytest.mark.parametrize("change", ["moved", "of a stage made anew", "stage.json lost"])
@pytest.mark.parametrize("stage", ["first", "second"])
def test_folders(run, tmp_path, tally, stage, change):
    work = Path(shutil.copytree(run.folder, tmp_path / "deep" / "other" / "r"))
    record = work / stage / "stage.json"
    if change == "of a stage made anew":
        record.write_text(record.read_text().replace(f'"{stage[0]}"', '"anew"'))
        assert ("one" if stage == "first" else "two") not in read_results(work)
        notes = read_run(work).notes
        assert any(f"are of an earlier stage {stage}" in note for note in notes)
        tally(f"results {change}", same=False)
        return
    if change == "stage.json lost":
        record.unlink()
    tally(f"results {change}", same=same(run, work, RESULTS))
