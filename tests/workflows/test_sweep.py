"""A sweep skips what is done, trains equal stages once, and a failed run stops no other."""

from __future__ import annotations

import csv
import io
import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
from forks import dominie
from rich.console import Console
from safetensors.torch import load_file

from dominie.core.display import Display
from dominie.core.errors import RunError
from dominie.workflows import sweep
from dominie.workflows.sweep import run_trials, sweep_recipe
from dominie.workflows.sweep_trials import Trial, grid, rows_of

MINI = Path(__file__).parents[1] / "recipes" / "mini.yaml"
RATE = "stages.sft.train.learning_rate"
SMALL = [
    "evaluate.tasks={agreement: {source: general, metric: agreement, teacher: teacher, "
    "split: validation}, general: {source: general, split: test}}",
    "--only",
    "sft",
]


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
        "sweep", MINI, *SMALL, "--over", f"{RATE}=2e-3,1e12", "--jobs", 2, cwd=tmp_path
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


STEPS = "stages.sft.train.steps"

#: In place of `dominie run`: writes what a run writes, or fails if the steps are 13.
RUN = """
import json, pathlib, sys, time
run, steps = pathlib.Path(sys.argv[1]), int(sys.argv[2])
time.sleep(0.2)
if steps == 13:
    sys.exit("error: stage sft: unlucky\\n  do        take another number")
run.mkdir(parents=True, exist_ok=True)
with (run / "times").open("a") as file:
    file.write("ran\\n")
(run / "recipe.yaml").write_text("name: x")
score = {"score": steps / 100, "stderr": 0.1, "n": 9, "metric": "exact_match"}
(run / "results.json").write_text(json.dumps({"sft": {"general": score}}))
(run / "sft").mkdir(exist_ok=True)
record = {"fingerprint": "f", "status": "done", "steps": steps, "supervised_tokens": 7}
(run / "sft" / "stage.json").write_text(json.dumps(record))
"""


@pytest.fixture
def shown(monkeypatch) -> tuple[Display, io.StringIO]:
    """A display that keeps its lines, with a quick program in place of `dominie run`."""

    def started(trial: Trial, folder: Path) -> subprocess.Popen[bytes]:
        folder.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-c", RUN, str(folder / trial.name), trial.values[STEPS]]
        with (folder / f"{trial.name}.log").open("wb") as log:
            return subprocess.Popen(command, stdout=log, stderr=log)

    monkeypatch.setattr(sweep, "_start_run", started)
    out = io.StringIO()
    return Display(Console(file=out, width=200)), out


def test_a_failure_stops_no_other_run_and_what_is_done_is_skipped(shown, tmp_path):
    display, out = shown
    trials = grid(MINI, [f"{STEPS}=5,13,7"], only=["sft"])
    names: list[str] = []
    with pytest.raises(RunError, match=r"(?s)1 of 3 runs failed.*stage sft: unlucky"):
        run_trials(
            trials, tmp_path, jobs=2, display=display, finished=lambda t: names.append(t.name)
        )
    assert sorted(names) == ["steps-5", "steps-7"]
    changed = grid(MINI, [f"{STEPS}=5,6,7"], only=["sft"])
    done = run_trials(changed, tmp_path, jobs=2, display=display)
    assert len(done) == 3
    assert "2 of 3 runs are done already" in out.getvalue()
    assert (tmp_path / "steps-5" / "times").read_text() == "ran\n"
    (row,) = rows_of(changed[1], tmp_path)
    assert (row.score, row.steps, row.tokens) == (0.06, 6, 7)
    record = json.loads((tmp_path / "steps-6" / "sweep.json").read_text())
    assert (record["values"], record["seed"]) == ({STEPS: "6"}, None)
    # Another value of the same trial's recipe is another run.
    again = grid(MINI, [f"{STEPS}=5"], only=["sft"], fixed=["train.batch=16"])
    run_trials(again, tmp_path, jobs=1, display=display)
    assert (tmp_path / "steps-5" / "times").read_text() == "ran\nran\n"


def test_no_run_starts_after_the_deadline(shown, tmp_path):
    display, out = shown
    trials = grid(MINI, [f"{STEPS}=5,6"], only=["sft"])
    done = run_trials(trials, tmp_path, jobs=1, display=display, deadline=time.monotonic() - 1)
    assert done == []
    assert "2 runs are left for another call" in out.getvalue()


def test_a_sweep_ends_in_one_table_and_the_best_values(shown, tmp_path):
    display, out = shown
    printed: list[str] = []
    options = {
        "over": [f"{STEPS}=5,70"],
        "seeds": None,
        "fixed": ["evaluate.tasks={general: {source: general, split: validation}}"],
        "only": ["sft"],
        "best_by": ["general"],
        "jobs": 2,
        "runs": tmp_path,
        "display": display,
    }
    folder = sweep_recipe(MINI, **options, print_json=printed.append)
    assert json.loads(printed[0])["best"] == {"sft": {STEPS: "70"}}
    lines = (folder / "results.csv").read_text().splitlines()
    assert lines[0] == f"run,{STEPS},seed,model,task,score,stderr,n,steps,tokens,seconds"
    assert lines[2].startswith("steps-70,70,,sft,general,0.7,0.1,9,70,7,")
    sweep_recipe(MINI, **options)
    assert "best of sft by general: stages.sft.train.steps=70" in out.getvalue()
    assert "70.0" in out.getvalue()
