"""A sweep through the command line: shared stages are trained once, failures stay alone."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file

MINI = Path(__file__).parents[1] / "recipes" / "mini.yaml"
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
RATE = "stages.sft.train.learning_rate"
SMALL = [
    "evaluate.tasks={agreement: {source: general, metric: agreement, teacher: teacher, "
    "split: validation}, general: {source: general, split: test}}",
    "--only",
    "sft",
]


def dominie(*arguments: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "dominie", *map(str, arguments)]
    return subprocess.run(
        command, cwd=cwd, env=ENVIRONMENT, capture_output=True, text=True, timeout=280, check=False
    )


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--best-by", "general"], ["not chosen on the test split", "split: validation"]),
        (["--over", "train.steps=two"], ["train.steps", "a whole number"]),
        (["--only", "stf"], ["--only", "did you mean sft?"]),
        (["--jobs", "0", "--seeds", "0-1"], ["--jobs"]),
        (["evaluate=null"], ["evaluates nothing"]),
        ([], ["nothing to vary", "--over KEY=V1,V2, --seeds 0-4"]),
    ],
)
def test_a_sweep_that_cannot_be_run_says_so_before_it_begins(tmp_path, arguments, words):
    done = dominie("sweep", MINI, *arguments, cwd=tmp_path)
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    for word in words:
        assert word in done.stderr
    assert not (tmp_path / "runs").exists()


@pytest.mark.full
def test_a_sweep_ends_what_it_can_and_goes_on_from_there(tmp_path):
    broken = dominie(
        "sweep", MINI, *SMALL, "--over", f"{RATE}=2e-3,1e30", "--jobs", 2, cwd=tmp_path
    )
    assert broken.returncode == 1, broken.stdout + broken.stderr
    assert "1 of 2 runs failed" in broken.stderr
    assert "not finite" in broken.stderr
    folder = tmp_path / "runs" / "mini-sweep"
    first = folder / "learning-rate-2e-3"
    stamp = (first / "sft" / "model" / "model.safetensors").stat().st_mtime_ns

    arguments = ["sweep", MINI, *SMALL, "--over", f"{RATE}=2e-3,1e-3", "--best-by", "agreement"]
    done = dominie(*arguments, "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert set(found["best"]) == {"sft"}
    assert found["best"]["sft"][RATE] in ("2e-3", "1e-3")
    assert (first / "sft" / "model" / "model.safetensors").stat().st_mtime_ns == stamp
    with (folder / "results.csv").open() as file:
        table = list(csv.DictReader(file))
    assert [(row[RATE], row["task"]) for row in table] == [
        (rate, task) for rate in ("2e-3", "1e-3") for task in ("agreement", "general")
    ]
    assert all(int(row["steps"]) == 6 and int(row["tokens"]) > 0 for row in table)

    # The teacher was trained once; whoever came second links it, and trains its own sft.
    second = folder / "learning-rate-1e-3"
    records = [json.loads((run / "teacher" / "stage.json").read_text()) for run in (first, second)]
    assert records[0]["fingerprint"] == records[1]["fingerprint"]
    assert records[1]["taken_from"].endswith("/teacher")
    inodes = {(run / "teacher/model/model.safetensors").stat().st_ino for run in (first, second)}
    assert len(inodes) == 1
    assert "taken from" in (folder / f"{second.name}.log").read_text()
    ours, theirs = (load_file(run / "sft/model/model.safetensors") for run in (first, second))
    assert any(not bool((ours[key] == theirs[key]).all()) for key in ours)

    started = time.monotonic()
    again = dominie(*arguments, cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    assert "2 of 2 runs are done already" in again.stdout
    assert "best of sft by agreement" in again.stdout
    assert time.monotonic() - started < 40


@pytest.mark.full
def test_a_stage_taken_over_is_the_stage_that_would_have_been_trained(tmp_path):
    for name in ("one", "two"):
        done = dominie("run", MINI, *SMALL, "--reuse", f"name={name}", cwd=tmp_path)
        assert done.returncode == 0, done.stderr
    assert "sft: taken from one/sft" in done.stdout
    results = [(tmp_path / "runs" / n / "results.json").read_text() for n in ("one", "two")]
    assert results[0] == results[1]
    changed = dominie(
        "run", MINI, *SMALL, "--reuse", "name=two", "stages.sft.train.steps=4", cwd=tmp_path
    )
    assert changed.returncode == 0, changed.stderr
    assert "taken from" not in changed.stdout
    kept = json.loads((tmp_path / "runs/one/sft/stage.json").read_text())
    assert kept["steps"] == 6, "what was linked is not touched"
    followed = dominie(
        "run", MINI, *SMALL, "--reuse", "name=one", "stages.sft.train.steps=4", cwd=tmp_path
    )
    assert "sft: taken from two/sft" in followed.stdout
    assert json.loads((tmp_path / "runs/one/sft/stage.json").read_text())["steps"] == 4
    assert list((tmp_path / "runs/one/.replaced").iterdir()), "the earlier result is kept"
