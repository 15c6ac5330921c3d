"""Metrics for TensorBoard and the like: flat, complete, kept, and a run for each stage."""

from __future__ import annotations

import json
import sys
from types import SimpleNamespace

import pytest

from dominie.cli import app
from dominie.recipe import load_recipe
from dominie.running.fingerprints import digest, training_parts
from dominie.training.arguments import training_arguments
from dominie.training.progress import StepProgress
from dominie.training.settings import TrainSettings
from dominie.training.trackers import OneRunAStage, flat, keep_tensorboard

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
