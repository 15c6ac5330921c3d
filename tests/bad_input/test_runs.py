"""Damaged run folders, failing runs and signals: one message, and nothing lost."""

from __future__ import annotations

import fcntl
import json
import shutil
import signal
import time
from pathlib import Path

import forks
import pytest


@pytest.fixture(scope="session")
def finished(template, tmp_path_factory) -> Path:
    """The template after its run."""
    folder = shutil.copytree(template, tmp_path_factory.mktemp("finished") / "work")
    done = forks.dominie("run", "r.yaml", cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture
def ran(finished, tmp_path, monkeypatch) -> Path:
    """The run's folder in a copy of `finished`, which is the current folder."""
    folder = shutil.copytree(finished, tmp_path / "ran")
    monkeypatch.chdir(folder)
    return folder / "runs" / "small"


def test_a_place_for_runs_that_is_none(refused, work, dominie):
    refused(dominie("run", "r.yaml", "--runs", "d.jsonl"), "cannot be written", "--runs DIR")
    refused(dominie("run", "r.yaml", "--runs", "/proc/none"), "cannot be written", "/proc/none")
    (work / "runs").mkdir()
    (work / "runs" / "small").write_text("")
    refused(dominie("run", "r.yaml"), "runs/small", "cannot be written")


def test_a_folder_that_another_process_holds(refused, ran, dominie):
    with (ran / ".lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        refused(dominie("run", "r.yaml"), "another dominie is at work")
    assert dominie("run", "r.yaml").status == 0


@pytest.mark.parametrize("text", [b"{", b"[1]", b"{}", b"\xff\xfe"])
def test_a_broken_stage_json_is_named_and_costs_nothing(refused, ran, dominie, text):
    (ran / "s" / "stage.json").write_bytes(text)
    weights = (ran / "s" / "model" / "model.safetensors").read_bytes()
    for verb in ("run", "evaluate"):
        refused(dominie(verb, "r.yaml"), "s/stage.json", "out of the way")
    assert (ran / "s" / "model" / "model.safetensors").read_bytes() == weights


def test_a_stage_without_its_record_is_kept_aside(ran, dominie):
    (ran / "s" / "stage.json").unlink()
    weights = (ran / "s" / "model" / "model.safetensors").read_bytes()
    said = dominie("run", "r.yaml")
    assert said.status == 0, said.err
    assert "kept in runs/small/.replaced/s-unknown" in said.out
    kept = ran / ".replaced" / "s-unknown" / "model" / "model.safetensors"
    assert kept.read_bytes() == weights


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("results.json", "{"),
        ("evaluation/s/t.json", "{"),
        ("evaluation/s/t.json", '{"fingerprint": 3}'),
        ("s/metrics.jsonl", "{{\n"),
        ("rows/*/prepared.json", "{"),
        ("rows/*/train.arrow", "not arrow"),
    ],
)
def test_what_can_be_made_again_is_made_again(ran, dominie, name, text):
    results = json.loads((ran / "results.json").read_text())
    for path in ran.glob(name):
        path.write_text(text)
    said = dominie("run", "r.yaml")
    assert said.status == 0, said.err
    assert "already trained" in said.out
    assert json.loads((ran / "results.json").read_text()) == results


def test_a_damaged_result_is_named(refused, ran, dominie):
    shutil.rmtree(ran / "evaluation")
    weights = ran / "s" / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    for verb in ("run", "evaluate"):
        refused(dominie(verb, "r.yaml"), "runs/small/s:", "model.safetensors is 1000 bytes")


def test_evaluating_before_training(refused, work, dominie):
    refused(dominie("evaluate", "r.yaml"), "stage s has not been trained", "dominie run")


def test_a_report_on_what_is_no_run(refused, work, dominie):
    refused(dominie("report", "nowhere"), "no such run folder")
    refused(dominie("report", "m"), "not a run")
    refused(dominie("report", "r.yaml"), "no such run folder")
    (work / "mine").mkdir()
    (work / "r.yaml").rename(work / "mine" / "recipe.yaml")
    refused(dominie("report", "mine"), "a recipe's folder", "`dominie run mine`")
    assert [path.name for path in (work / "mine").iterdir()] == ["recipe.yaml"]


def test_a_run_is_known_by_its_name(refused, ran, dominie):
    assert dominie("report", "small").out == "runs/small/report.html\n"
    refused(dominie("report", "smal"), "did you mean runs/small?")
    refused(dominie("compare", "small", "smal"), "did you mean runs/small?")
    refused(dominie("compare", "small"), "a scatter plot needs two tasks")
    recipe = Path("small") / "recipe.yaml"  # a folder of this name that is no run stands back
    recipe.parent.mkdir()
    recipe.write_text(Path("r.yaml").read_text())
    assert dominie("report", "small").out == "runs/small/report.html\n"


def test_a_loss_that_is_not_finite_stops_before_the_step(refused, work, dominie):
    overrides = ["train.learning_rate=1e12", "train.steps=6", "train.checkpoint_every=1"]
    said = dominie("run", "r.yaml", *overrides)
    refused(said, "stage s, step", "not finite", "before the optimiser step", "d[", status=1)
    checkpoints = list((work / "runs" / "small" / "s" / "checkpoints").glob("checkpoint-*"))
    assert checkpoints, "what was whole is kept"


def test_a_full_disk_keeps_the_checkpoints_before(refused, work):
    """The size of any file is limited, so that weights can be written and optimiser state not."""
    program = (
        "import resource; size = 1_500_000\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))\n"
        "from dominie.cli import main\n"
        "main()"
    )
    done = forks.dominie("run", "r.yaml", "train.checkpoint_every=1", cwd=work, program=program)
    refused((done.returncode, done.stdout, done.stderr), "cannot be written", status=1)
    assert not list((work / "runs" / "small" / "s").glob("checkpoints/.writing/*"))


@pytest.mark.parametrize(
    ("signum", "status", "appears", "rows"),
    [
        (signal.SIGINT, 130, "runs/small/rows", 2400),
        (signal.SIGTERM, 143, "runs/small/rows", 2400),
        (signal.SIGTERM, 143, "runs/small/s/model", 400),
    ],
)
def test_a_signal_outside_training(refused, work, signum, status, appears, rows):
    """While many rows are prepared, and while long answers are written."""
    overrides = [f"data.d.path=toyworld:general?rows={rows}", "evaluate.tasks.t.max_new_tokens=200"]
    process = forks.Fork("run", "r.yaml", *overrides, cwd=work)
    while not (work / appears).exists() and process.poll() is None:
        time.sleep(0.01)
    assert process.poll() is None, "it ended before the signal"
    process.send_signal(signum)
    _, err = process.communicate(timeout=60)
    refused((process.returncode, "", err), signal.Signals(signum).name, status=status)
    assert not list((work / "runs").rglob(".making-*"))


def test_a_run_does_not_replace_the_model_that_it_begins_from(refused, ran, dominie):
    """Another recipe that is called as the run from which it goes on."""
    before = (ran / "s" / "model" / "model.safetensors").read_bytes()
    again = ["run", "r.yaml", "stages.s.student=runs/small/s/model", "train.steps=1"]
    refused(dominie(*again), "this run would overwrite a model that it reads", "name=small-2")
    assert (ran / "s" / "model" / "model.safetensors").read_bytes() == before
    assert not (ran / ".replaced").exists()
