"""Running cells: what is done is skipped, what fails is told, the clock is obeyed."""

from __future__ import annotations

import io
import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
from rich.console import Console

from dominie.core.display import Display
from dominie.core.errors import RunError
from dominie.workflows import sweep as runner
from dominie.workflows.sweep import run_cells, sweep_recipe
from dominie.workflows.sweep_cells import Cell, grid, rows_of

MINI = Path(__file__).parents[1] / "recipes" / "mini.yaml"
STEPS = "stages.sft.train.steps"

#: Stands in for `dominie run`: leaves what a run leaves, or fails where the steps are 13.
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
def said(monkeypatch) -> tuple[Display, io.StringIO]:
    """Runs are stood in for; what is displayed is kept."""

    def started(cell: Cell, folder: Path) -> subprocess.Popen[bytes]:
        folder.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-c", RUN, str(folder / cell.name), cell.values[STEPS]]
        with (folder / f"{cell.name}.log").open("wb") as log:
            return subprocess.Popen(command, stdout=log, stderr=log)

    monkeypatch.setattr(runner, "_started", started)
    out = io.StringIO()
    return Display(Console(file=out, width=200)), out


def test_a_failure_costs_itself_alone_and_the_rest_is_not_run_again(said, tmp_path):
    display, out = said
    cells = grid(MINI, [f"{STEPS}=5,13,7"], only=["sft"])
    ended: list[str] = []
    with pytest.raises(RunError, match=r"(?s)1 of 3 runs failed.*stage sft: unlucky"):
        run_cells(cells, tmp_path, jobs=2, display=display, finished=lambda c: ended.append(c.name))
    assert sorted(ended) == ["steps-5", "steps-7"]
    changed = grid(MINI, [f"{STEPS}=5,6,7"], only=["sft"])
    done = run_cells(changed, tmp_path, jobs=2, display=display)
    assert len(done) == 3
    assert "2 of 3 runs are done already" in out.getvalue()
    assert (tmp_path / "steps-5" / "times").read_text() == "ran\n"
    (row,) = rows_of(changed[1], tmp_path)
    assert (row.score, row.steps, row.tokens) == (0.06, 6, 7)
    record = json.loads((tmp_path / "steps-6" / "sweep.json").read_text())
    assert (record["values"], record["seed"]) == ({STEPS: "6"}, None)
    # Another value of the same cell's recipe is another run.
    again = grid(MINI, [f"{STEPS}=5"], only=["sft"], fixed=["train.batch=16"])
    run_cells(again, tmp_path, jobs=1, display=display)
    assert (tmp_path / "steps-5" / "times").read_text() == "ran\nran\n"


def test_no_run_begins_when_time_is_up(said, tmp_path):
    display, out = said
    cells = grid(MINI, [f"{STEPS}=5,6"], only=["sft"])
    done = run_cells(cells, tmp_path, jobs=1, display=display, deadline=time.monotonic() - 1)
    assert done == []
    assert "2 runs are left for another call" in out.getvalue()


def test_a_sweep_ends_in_one_table_and_the_best_of_it(said, tmp_path):
    display, out = said
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
