"""The plan of the evidence is what it says, its path runs, and its tables are right."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from ruamel.yaml import YAML

from dominie.recipe import load_recipe

ROOT = Path(__file__).parents[2]
PLAN = YAML(typ="safe", pure=True).load((ROOT / "benchmarks" / "evidence.yaml").read_text())


@pytest.fixture(scope="module", autouse=True)
def _importable():
    """The scripts, importable."""
    places = [str(ROOT / "benchmarks"), str(ROOT / "benchmarks" / "parts")]
    sys.path[:0] = places
    yield
    for place in places:
        sys.path.remove(place)


def test_the_plan_fits_its_budget_and_varies_one_factor_at_a_time():
    import evidence

    trials = [t for group in PLAN["groups"] for t in evidence.trials_of(group, PLAN["chosen"])]
    assert len({trial.name for trial in trials}) == len(trials)
    assert len({trial.digest() for trial in trials}) == len(trials), "no run is made twice"
    assert evidence.estimate(trials) / 2 / 60 < 120, "minutes on two cores"
    assert evidence.estimate(trials + trials) < 1.5 * evidence.estimate(trials), "stages are shared"
    base = [trial for trial in trials if trial.name.startswith("base-seed")]
    assert [trial.seed for trial in base] == [0, 1, 2, 3, 4]
    assert all(len(list(trial.loaded().evaluate.models)) >= 20 for trial in base[:1])


def test_what_is_chosen_takes_effect_and_no_test_split_trains():
    files = {group["recipe"] for group in PLAN["groups"]}
    recipes = [load_recipe(ROOT / "benchmarks" / file) for file in sorted(files)]
    stages = {name for recipe in recipes for name in recipe.stages}
    for key in PLAN["chosen"]:
        assert key.split(".")[1] in stages, key
    for recipe in recipes:
        held_out = {n for n, source in recipe.data.items() if source.test_fraction}
        learnt = {s for stage in recipe.trained.values() for s in stage.active}
        assert not held_out & learnt, "questions are no training data"
        assert {task.source for task in recipe.evaluate.tasks.values()} <= held_out


def test_the_recipes_have_what_was_chosen():
    for file in (ROOT / "recipes" / "baselines").glob("*.yaml"):
        stages = load_recipe(file).stages
        for key, value in PLAN["chosen"].items():
            _, stage, _, setting = key.split(".")
            if stage in stages:
                assert getattr(stages[stage].train, setting) == float(value), f"{file.name} {key}"


def test_the_plan_for_a_gpu_can_be_read_and_has_large_models():
    import evidence

    trials = [trial for group in PLAN["gpu"] for trial in evidence.trials_of(group, {})]
    for trial in trials:
        students = {
            stage.student
            for name, stage in trial.loaded().trained.items()
            if stage.student.startswith("toyworld:")
        }
        assert all("width=1024" in student for student in students), trial.name


def test_the_recipes_share_their_student():
    import evidence

    one, other = (load_recipe(ROOT / "benchmarks" / g["recipe"]) for g in PLAN["groups"][:2])
    assert evidence._key(one, "distill") == evidence._key(other, "kd_attention")
    mixture = load_recipe(ROOT / "recipes" / "baselines" / "mixture.yaml")
    for stage in ("teacher", "distill", "expert", "dae"):
        assert evidence._key(one, stage) == evidence._key(mixture, stage)


def row(model: str, seed: int, task: str, score: float, group: str = "base") -> dict[str, str]:
    return {
        "group": group, "run": f"{group}-{seed}", "setting": "", "seed": str(seed), "model": model,
        "task": task, "score": str(score), "stderr": "0.01", "n": "100",
        "steps": "10", "tokens": "1000", "seconds": "2.5",
    }  # fmt: skip


def test_gain_and_kept_are_shares_run_by_run():
    from evidence_tables import tables

    rows = []
    for seed, luck in ((0, 0.0), (1, 0.1)):
        for model, general, domain in (
            ("distill", 0.8, 0.1), ("expert", 0.1, 0.7), ("dae", 0.76, 0.64), ("mix", 0.7, 0.5)
        ):  # fmt: skip
            rows += [
                row(model, seed, "general", general + luck * general),
                row(model, seed, "domain", domain),
            ]
    rows += [row("dae", seed, "domain", 0.4, group="noise") for seed in (0, 1)]
    text = tables(rows)
    dae = next(line for line in text.splitlines() if line.startswith("| dae"))
    cells = [cell.strip() for cell in dae.strip("|").split("|")]
    assert cells[1] == "2"
    assert cells[4] == "90.0", "(0.64 - 0.1) / (0.7 - 0.1); two that agree have no interval"
    assert cells[5] == "95.0", "0.76 / 0.8, whatever the seed's luck"
    assert cells[6:] == ["–", "–", "1,000", "2"]
    mix = next(line for line in text.splitlines() if line.startswith("| mix"))
    assert "| -14.0 |" in mix
    noise = text[text.index("### noise") :]
    assert "| 50.0 |" in noise, "student and expert are those of the base where it has none"


@pytest.mark.full
def test_the_path_runs_in_seconds(tmp_path):
    """Two runs of a baseline recipe, teacher to scores, over the sweep's own machinery."""
    done = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / "evidence.py"), "--quick", "--json"],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=250,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert {(r["model"], r["task"], r["seed"]) for r in rows} == {
        (model, task, seed)
        for model in ("distill", "expert", "dae", "merge_50")
        for task in ("general", "domain", "general_validation", "domain_validation")
        for seed in (0, 1)
    }
    assert "2 runs, about" in done.stderr
    assert not list(tmp_path.iterdir()), "results are left alone"


def test_the_picture_shows_who_is_left_and_their_front():
    import xml.etree.ElementTree as ET

    from evidence_scatter import scatter

    where = {"distill": (0.9, 0.1), "expert": (0.1, 0.8), "dae": (0.88, 0.7), "mix": (0.8, 0.6)}
    rows = [
        row(model, seed, task, score + 0.01 * seed)
        for model, both in where.items()
        for task, score in zip(("general", "domain"), both, strict=True)
        for seed in (0, 1, 2)
    ]
    drawing = ET.fromstring(scatter(rows, ("base", ""), least=0.5))
    words = [text.text for text in drawing.iter("{http://www.w3.org/2000/svg}text")]
    assert {"distill", "dae", "mix"} < set(words)
    assert "expert" not in words, "below the least general score"
    (front,) = drawing.iter("{http://www.w3.org/2000/svg}polyline")
    assert front.get("class") == "front"
    assert len(front.get("points").split()) == 3, "from dae to distill; mix is beaten"
