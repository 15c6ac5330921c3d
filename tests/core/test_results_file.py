"""What results are of: a seal tells changed files, stages made anew, and what still holds."""

from __future__ import annotations

import contextlib
import json
import re
import shutil
from pathlib import Path

import pytest
from run_folders import entry

from dominie.core.errors import InputError
from dominie.core.results_file import (
    SEAL,
    read_comparisons,
    read_results,
    with_others,
    write_results,
)
from dominie.core.run_records import read_run
from dominie.report import compare_runs

TASKS = {"general": {"asks": "g", "stages": {}}, "near": {"asks": "n", "stages": {"teach": "t1"}}}


def scored(run: Path) -> dict[str, dict[str, dict]]:
    """Write a run of two stages, a teacher that a task needs, and a model that no stage makes."""
    for stage, fingerprint in (("first", "f1"), ("second", "s1"), ("teach", "t1")):
        made(run, stage, fingerprint)
    results = {
        model: {"general": entry(score), "near": entry(score)}
        for model, score in (("base", 0.2), ("one", 0.4), ("two", 0.6))
    }
    seal = {
        "models": {
            "base": {"model": "some/base", "stages": {}},
            "one": {"model": "first", "stages": {"first": "f1"}},
            "two": {"model": "second", "stages": {"second": "s1"}},
        },
        "tasks": TASKS,
    }
    pair = {"difference": 0.4, "interval": [0.3, 0.5]}
    differences = {"general": {"two": {"base": pair, "one": pair}}}
    (run / "evaluation").mkdir()
    write_results(run, results, "base", differences, seal)
    return results


def made(run: Path, stage: str, fingerprint: str, status: str = "done") -> None:
    (run / stage).mkdir(parents=True, exist_ok=True)
    record = {"name": stage, "status": status, "fingerprint": fingerprint}
    (run / stage / "stage.json").write_text(json.dumps(record))


def test_what_was_written_is_read(tmp_path):
    results = scored(tmp_path)
    notes: list[str] = []
    assert read_results(tmp_path) == read_results(tmp_path, notes) == results
    assert set(read_comparisons(tmp_path, notes)[1]["general"]) == {("two", "base"), ("two", "one")}
    assert not notes
    (tmp_path / SEAL).unlink()  # of an earlier version
    assert read_results(tmp_path, notes) == results
    assert not notes


@pytest.mark.parametrize("status", ["running", "done"])
def test_scores_of_a_stage_made_anew_are_not_its_own(tmp_path, status):
    results = scored(tmp_path)
    made(tmp_path, "second", "s2", status)
    assert list(read_results(tmp_path)) == ["base", "one"]
    run = read_run(tmp_path)
    assert list(run.results) == ["base", "one"]
    assert not any(run.differences.values())
    (note,) = [note for note in run.notes if "earlier" in note]
    assert note.startswith("The scores of two in results.json are of an earlier stage second")
    compared = compare_runs([tmp_path], across=None, upwards=None, against=None)
    assert [point.name for point in compared.points] == ["base", "one"]
    assert any("earlier stage second" in note for note in compared.notes)
    made(tmp_path, "second", "s1")
    assert read_results(tmp_path) == results


def test_scores_with_a_teacher_made_anew_are_left_out(tmp_path):
    scored(tmp_path)
    made(tmp_path, "teach", "t2")
    notes: list[str] = []
    assert {model: list(tasks) for model, tasks in read_results(tmp_path, notes).items()} == {
        "base": ["general"], "one": ["general"], "two": ["general"],
    }  # fmt: skip
    (note,) = notes
    assert note.startswith("The scores on near in results.json were measured with an earlier")


def test_scores_outlive_the_folders_of_stages(tmp_path):
    results = scored(tmp_path)
    for stage in ("first", "second", "teach"):
        shutil.rmtree(tmp_path / stage)
    assert read_results(tmp_path) == results


def test_changed_results_are_not_believed_in_silence(tmp_path):
    scored(tmp_path)
    path = tmp_path / "results.json"
    path.write_text(path.read_text().replace("0.6", "0.9"))
    with pytest.raises(InputError, match=r"(?s)cannot be read.*not as it was written"):
        read_results(tmp_path)
    run = read_run(tmp_path)
    assert run.results["two"]["general"].score == 0.9
    (note,) = [note for note in run.notes if "as it was written" in note]
    assert note.startswith("results.json is not as it was written")
    compared = compare_runs([tmp_path], across=None, upwards=None, against=None)
    assert any("results.json is not as it was written" in note for note in compared.notes)


def test_changed_comparisons_do_not_decide(tmp_path):
    scored(tmp_path)
    path = tmp_path / "evaluation" / "comparisons.json"
    path.write_text(path.read_text().replace("0.3", "0.2"))
    run = read_run(tmp_path)
    assert not run.differences
    assert any("comparisons.json is not as it was written" in note for note in run.notes)


@pytest.mark.parametrize("name", ["results.json", SEAL, "evaluation/comparisons.json"])
def test_a_damaged_key_is_a_note_or_one_error(tmp_path, name):
    scored(tmp_path)
    path = tmp_path / name
    text = path.read_text()
    for key in sorted(set(re.findall(r'"([^"]+)":', text))):
        for sealed in (True, False):
            path.write_text(text.replace(f'"{key}":', f'"{key[:-1]}#":', 1))
            if not sealed:
                (tmp_path / SEAL).rename(tmp_path / "kept")
            with contextlib.suppress(InputError):
                read_results(tmp_path)
            assert read_run(tmp_path).name == tmp_path.name
            with contextlib.suppress(InputError):
                compare_runs([tmp_path], across=None, upwards=None, against="base")
            if not sealed:
                (tmp_path / "kept").rename(tmp_path / SEAL)
        path.write_text(text)
    bare = {"base": {"general": {"scora": 0.5}}}
    (tmp_path / SEAL).unlink(missing_ok=True)
    (tmp_path / "results.json").write_text(json.dumps(bare))
    with pytest.raises(InputError, match="no figures of base"):
        read_results(tmp_path)


NAMES = {"base": "some/base", "one": "first", "two": "second", "api": "api"}


def test_results_of_other_models_are_kept(tmp_path):
    results = scored(tmp_path)
    new = {"one": {"general": entry(0.5), "near": entry(0.5)}}
    own = {"model": "first", "stages": {"first": "f1"}}
    seal = {"models": {"one": own}, "tasks": TASKS}
    found = with_others(tmp_path, NAMES, new, seal)
    assert found == {**results, **new}
    assert list(found) == ["base", "one", "two"], "in the order of the recipe"
    assert list(seal["models"]) == ["one", "base", "two"]


@pytest.mark.parametrize("change", ["anew", "another model", "task", "gone", "damaged", "teacher"])
def test_results_that_no_longer_hold_are_not_kept(tmp_path, change):
    scored(tmp_path)
    new = {"one": {"general": entry(0.5), "near": entry(0.5)}}
    tasks, names = dict(TASKS), dict(NAMES)
    if change == "anew":
        made(tmp_path, "second", "s2")
    elif change == "another model":
        names["two"] = "third"
    elif change == "gone":
        del names["two"]
    elif change == "task":
        tasks["general"] = {"asks": "other questions", "stages": {}}
    elif change == "teacher":
        made(tmp_path, "teach", "t2")
        tasks["near"] = {"asks": "n", "stages": {"teach": "t2"}}
    else:
        (tmp_path / "results.json").write_text("{}")
    found = with_others(tmp_path, names, new, {"models": {}, "tasks": tasks})
    left = {model: list(of) for model, of in found.items()}
    two = {"task": {"two": ["near"]}, "teacher": {"two": ["general"]}}.get(change, {})
    assert {"two": left["two"]} == two if two else "two" not in left


def test_results_of_a_run_in_which_no_model_answered(tmp_path):
    write_results(tmp_path, {}, "base", {}, {"models": {}, "tasks": {}})
    assert read_results(tmp_path) == {}
