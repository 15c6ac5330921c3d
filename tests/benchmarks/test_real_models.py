"""The evidence on a pretrained model: its plan, its tables, and every arm of its quick path."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def real_models():
    """The script, as a module."""
    places = [str(ROOT / "benchmarks"), str(ROOT / "benchmarks" / "parts")]
    sys.path[:0] = places
    import real_models

    yield real_models
    for place in places:
        sys.path.remove(place)


@pytest.fixture
def plan(real_models, tmp_path):
    """Its runs of two seeds, of which nothing is there yet."""
    paths = {"models.original.path": str(tmp_path / "model"), "stages.cut.prune.layers": 3}
    (tmp_path / "paths.json").write_text(json.dumps(paths))
    return real_models.trials(tmp_path, [0, 1])


def test_the_plan_has_every_arm_under_every_seed_the_most_important_first(real_models, plan):
    blocks = {**real_models.ALIGN, **real_models.CUT}
    assert {name.rpartition("-seed")[0] for name in plan} == set(blocks)
    arms = [model for trial in plan.values() if trial.seed == 0 for model in trial.only]
    recipe = next(iter(plan.values())).loaded()
    assert sorted(arms) == sorted(set(arms)), "no arm twice"
    trial = next(iter(plan.values()))
    assert {*arms} == {*_every_model(real_models)}
    assert recipe.evaluate.models.keys() == {*trial.only}
    assert next(iter(plan)) == "align-seed-0"
    assert list(plan).index("cut-seed-0") < list(plan).index("align-seed-1")
    assert list(plan).index("conversations-seed-0") > list(plan).index("cut-seed-1")


def _every_model(real_models) -> set[str]:
    from dominie.recipe import load_recipe

    return set(load_recipe(real_models.RECIPE).evaluate.models)


def test_arms_that_are_compared_read_as_many_rows(real_models):
    from dominie.recipe import load_recipe

    stages = load_recipe(real_models.RECIPE).stages
    for names in (
        ("expert", "lora", "asft"),
        ("mix", "mix_conversations", "labels_and_reference", "dae", "dae_conversations", "seqkd"),
        ("cut_labels", "cut_prediction", "cut_attention", "random_prediction"),
    ):
        reads = {
            (stage.train.steps, stage.train.batch, *(each.share for each in stage.data.values()))
            for stage in (stages[name] for name in names)
        }
        assert len(reads) == 1, reads


def test_tables_are_means_over_the_seeds_that_are_there(real_models):
    def row(model: str, seed: int, task: str, score: float) -> dict[str, str]:
        return {
            "model": model, "seed": str(seed), "task": task, "score": str(score), "stderr": "",
            "tokens": "1000" if model == "dae" else "", "seconds": "20" if model == "dae" else "",
        }  # fmt: skip

    rows = []
    for seed, f1 in ((0, 0.3), (1, 0.5)):
        rows += [row("original", seed, "entities", 0.1), row("expert", seed, "entities", 0.6)]
        rows += [row("dae", seed, "entities", f1), row("dae", seed, "moved", math.exp(-0.02))]
        rows += [row("original", seed, "hellaswag", 0.4), row("dae", seed, "hellaswag", 0.38)]
    rows.append(row("cut_prediction", 0, "moved", math.exp(-1.5)))
    text = real_models.tables(rows, real_models.ALIGNED, real_models.CUTS)
    dae = next(line for line in text.splitlines() if line.startswith("| dae "))
    cells = [cell.strip() for cell in dae.strip("|").split("|")]
    assert cells[1] == "2"
    assert cells[2].startswith("40.0 ±")
    assert cells[3].startswith("60.0 ±"), "of the expert's gain: 40 and 80 %"
    assert cells[5] == "95.0"
    assert cells[6:] == ["0.020", "1,000", "20"]
    assert "| cut_prediction | 1 | 1.500 | – | – |" in text


@pytest.mark.full
def test_every_arm_runs_on_a_tiny_model():
    command = [sys.executable, str(ROOT / "benchmarks" / "real_models.py"), "--quick", "--json"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=600, check=False, env=environment
    )
    assert done.returncode == 0, done.stderr[-2000:]
    lines = done.stdout.splitlines()  # packages that transformers imports may log there, too
    rows = [json.loads(line) for line in lines if line.startswith("{")]
    import yaml

    recipe = yaml.safe_load((ROOT / "benchmarks" / "real_models.yaml").read_text())
    assert {row["model"] for row in rows} == set(recipe["evaluate"]["models"])
    assert {row["task"] for row in rows} == {"entities", "hellaswag", "moved"}
    assert all(0 <= row["score"] <= 1 for row in rows)
    trained = {row["model"] for row in rows if row["tokens"]}
    assert trained == set(recipe["evaluate"]["models"]) - {"original", "cut"}
