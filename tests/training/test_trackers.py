"""Metrics for TensorBoard and the like: flat, complete, kept, and a run for each stage."""

from __future__ import annotations

import importlib.util
import json
import os
import sqlite3
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from dominie.cli import app
from dominie.recipe import load_recipe
from dominie.stages.fingerprint import digest, training_parts
from dominie.training.callbacks import OneRunAStage, StepProgress, flat, keep_tensorboard
from dominie.training.metric_sums import MetricsLog
from dominie.training.settings import TrainSettings, training_arguments

MEANS = {
    "terms": {"prediction": 0.5},
    "sources": {"general": {"tokens": 7, "divergence": 0.25}},
    "router": {"load": [[0.75, 0.25], [0.9, 0.1]], "entropy": [0.5, 0.25]},
}
RECIPE = """
name: small
data: {d: {path: "toyworld:general?rows=60", validation_fraction: 0.2}}
train: {learning_rate: 1e-3, steps: 3, batch: 4, max_length: 64, log_every: 1}
stages:
  one: {student: "toyworld:student", data: {d: 1.0}, loss: {next_token: 1.0}}
"""


def test_nested_means_become_flat_numbers():
    assert flat(MEANS) == {
        "term_prediction": 0.5,
        "general_tokens": 7,
        "general_divergence": 0.25,
        "router_entropy": 0.375,
        "router_least_load": 0.1,
    }
    assert flat({"terms": {}, "sources": {}}) == {}


def test_a_stage_is_a_run_of_its_own_unless_the_recipe_names_it(tmp_path):
    folder = tmp_path / "shop" / "align" / "checkpoints"
    found = training_arguments(TrainSettings(), folder, steps=1, ranks=1)
    assert (found.project, found.run_name, found.report_to) == ("shop", "shop/align", [])
    own = TrainSettings(arguments={"run_name": "mine"})
    assert training_arguments(own, folder, steps=1, ranks=1).run_name == "mine"


def test_tensorboard_does_not_write_among_the_checkpoints(tmp_path):
    class TensorBoardCallback:
        logging_dir: str | None = None

    mine, told = TensorBoardCallback(), TensorBoardCallback()
    told.logging_dir = "elsewhere"
    keep_tensorboard([mine, told, SimpleNamespace()], tmp_path)
    assert mine.logging_dir == str(tmp_path / "tensorboard")
    assert told.logging_dir == "elsewhere"


def test_wandb_is_closed_after_each_stage_that_reports_to_it(monkeypatch):
    closed = []
    wandb = SimpleNamespace(run=object(), finish=lambda: closed.append(1))
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    for report_to in (["tensorboard"], ["wandb"]):
        OneRunAStage().on_train_end(SimpleNamespace(report_to=report_to), None, None)
    assert closed == [1]


def test_asking_for_a_tracker_trains_nothing_anew(tmp_path):
    (tmp_path / "r.yaml").write_text(RECIPE)
    found = []
    for more in ([], ["train.report_to=none", "train.run_name=x"], ["train.weight_decay=0.1"]):
        recipe = load_recipe(tmp_path / "r.yaml", more)
        read = {"rows": {"d": "rows"}, "models": {"toyworld:student": "model"}}
        found.append(digest(training_parts(recipe, "one", **read)))
    assert found[0] == found[1] != found[2]


def test_progress_tells_losses_sources_rate_and_memory():
    shown = []
    progress = StepProgress(lambda *told: shown.append(told))
    logs = {
        "term_prediction": 0.5, "a_divergence": 0.25, "b_divergence": 0.125,
        "tokens_per_second": 12345.6, "learning_rate": 1.0,
    }  # fmt: skip
    progress.on_log(None, None, None, logs=logs)
    progress.on_log(None, None, None, logs={"eval_loss": 1.0})
    progress.on_step_end(None, SimpleNamespace(global_step=1, max_steps=2), None)
    ((step, steps, note),) = shown
    assert (step, steps) == (1, 2)
    assert note.startswith("prediction 0.500  KL: a 0.250 b 0.125  12,346 tokens/s  ")
    assert note.endswith(" GB")


@pytest.mark.full
def test_tensorboard_gets_what_metrics_jsonl_has(tmp_path, monkeypatch):
    pytest.importorskip("tensorboard", reason="pip install 'dominie[trackers]'")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.chdir(tmp_path)
    (tmp_path / "r.yaml").write_text(RECIPE)
    app(["run", "r.yaml", "train.report_to=tensorboard"], standalone_mode=False)
    stage = tmp_path / "runs" / "small" / "one"
    events = EventAccumulator(str(stage / "tensorboard"))
    events.Reload()
    lines = [json.loads(x) for x in (stage / "metrics.jsonl").read_text().splitlines()]
    for tag, values in {
        "train/term_next_token": {
            x["step"]: x["terms"]["next_token"] for x in lines if "terms" in x
        },
        "train/d_tokens": {x["step"]: x["sources"]["d"]["tokens"] for x in lines if "terms" in x},
        "eval/d_next_token": {
            x["step"]: x["evaluation"]["d"]["next_token"] for x in lines if "evaluation" in x
        },
    }.items():
        assert len(values) >= 3
        assert {e.step: e.value for e in events.Scalars(tag)} == pytest.approx(values, rel=1e-5)


@pytest.mark.full
def test_tensorboard_forgets_the_steps_that_are_done_again(tmp_path, monkeypatch):
    pytest.importorskip("tensorboard", reason="pip install 'dominie[trackers]'")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.chdir(tmp_path)
    (tmp_path / "r.yaml").write_text(RECIPE)
    run = ["run", "r.yaml", "train.report_to=tensorboard", "train.steps=6"]
    run += ["train.checkpoint_every=3", "data.d.validation_fraction=0"]
    written = MetricsLog.append

    def cut_off(self, record):
        if record.get("step") == 6:
            raise OSError("No space left on device")
        written(self, record)

    with monkeypatch.context() as patched:
        patched.setattr(MetricsLog, "append", cut_off)
        with pytest.raises(OSError, match="No space"):
            app(run, standalone_mode=False)
    stage = tmp_path / "runs" / "small" / "one"
    assert [path.name for path in stage.glob("checkpoints/checkpoint-*")] == ["checkpoint-3"]
    app(run, standalone_mode=False)
    events = EventAccumulator(str(stage / "tensorboard"))
    events.Reload()
    assert [e.step for e in events.Scalars("train/loss")] == [1, 2, 3, 4, 5, 6]
    assert len(list((stage / "tensorboard").iterdir())) == 2


TWO_STAGES = f"""{RECIPE}
  two: {{student: one, data: {{d: 1.0}}, loss: {{next_token: 1.0}}}}
"""


def reported_to(tracker: str, folder: Path, **environment: str) -> dict[str, list[dict[str, Any]]]:
    """The lines of `metrics.jsonl` of both stages, of a process of its own that reports them."""
    (folder / "r.yaml").write_text(TWO_STAGES)
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "dominie",
            "run",
            "r.yaml",
            f"train.report_to=[{tracker}]",
            "--json",
        ],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["run"] == "runs/small", "what a tracker prints is not for stdout"
    lines = {
        stage: (folder / "runs" / "small" / stage / "metrics.jsonl").read_text().splitlines()
        for stage in ("one", "two")
    }
    return {stage: [json.loads(line) for line in told] for stage, told in lines.items()}


@pytest.mark.full
def test_trackio_gets_what_metrics_jsonl_has_a_run_for_each_stage(tmp_path):
    if importlib.util.find_spec("trackio") is None:
        pytest.skip("pip install 'dominie[trackers]'")
    written = reported_to("trackio", tmp_path, TRACKIO_DIR=str(tmp_path / "trackio"))
    database = sqlite3.connect(tmp_path / "trackio" / "small.db")
    rows = database.execute("select run_name, metrics from metrics order by id").fetchall()
    told = [(run, json.loads(metrics)) for run, metrics in rows]
    for stage, lines in written.items():
        mine = [metrics for run, metrics in told if run == f"small/{stage}"]
        for here, there in (
            ("terms", "train/term_next_token"),
            ("evaluation", "eval/d_next_token"),
        ):
            expected = {
                line["step"]: (line[here] if here == "terms" else line[here]["d"])["next_token"]
                for line in lines
                if here in line
            }
            assert len(expected) >= 3
            found = {m["train/global_step"]: m[there] for m in mine if there in m}
            assert found == pytest.approx(expected, rel=1e-5)
    assert {run for run, _ in told} == {"small/one", "small/two"}


@pytest.mark.full
def test_wandb_offline_has_a_run_for_each_stage(tmp_path):
    if importlib.util.find_spec("wandb") is None:
        pytest.skip("pip install wandb")
    own = {"WANDB_MODE": "offline", "WANDB_DIR": str(tmp_path), "WANDB_PROJECT": "small"}
    written = reported_to("wandb", tmp_path, **own)
    logs = [path.read_bytes() for path in sorted(tmp_path.glob("wandb/offline-run-*/*.wandb"))]
    for log, (stage, lines) in zip(logs, written.items(), strict=True):
        assert f"small/{stage}".encode() in log
        values = [line["terms"]["next_token"] for line in lines if "terms" in line]
        assert len(values) >= 3
        for value in values:
            assert json.dumps(value).encode()[:10] in log
