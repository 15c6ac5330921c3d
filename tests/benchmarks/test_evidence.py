"""The plan of the evidence is what it says, its path runs, and its tables are right."""

from __future__ import annotations

import json
import operator
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
    compared = set(base[0].loaded().evaluate.models)
    balanced = {name for name in compared if name.endswith("_balanced")}
    assert {"mix_balanced", "labels_and_reference_balanced", "dae_balanced"} <= balanced
    assert {name.removesuffix("_balanced") for name in balanced} <= compared, "balance on and off"
    assert {"seqkd", "asft", "tune_then_recover"} <= compared
    assert any(name.startswith("arithmetic") for name in compared)


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
    for file in {group["recipe"] for group in PLAN["groups"]}:
        stages = load_recipe(ROOT / "benchmarks" / file).stages
        for key, value in PLAN["chosen"].items():
            _, stage, *settings = key.split(".")
            found = operator.attrgetter(".".join(settings))(stages[stage])
            assert found == float(value), f"{file} {key}"


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

    one, other, mixture = (
        load_recipe(ROOT / "recipes" / "baselines" / f"{name}.yaml")
        for name in ("alignment", "distillation", "mixture")
    )
    assert evidence._key(one, "distill") == evidence._key(other, "kd_attention")
    for stage in ("teacher", "distill", "expert", "dae"):
        assert evidence._key(one, stage) == evidence._key(mixture, stage)


def row(model: str, seed: int, task: str, score: float, group: str = "base") -> dict[str, str]:
    return {
        "group": group, "run": f"{group}-{seed}", "setting": "", "seed": str(seed), "model": model,
        "task": task, "score": str(score), "stderr": "0.01", "n": "100",
        "steps": "10", "tokens": "1000", "seconds": "2.5",
    }  # fmt: skip


def test_gain_and_kept_are_shares_run_by_run():
    from evidence_tables import REFERENCE, tables

    rows = []
    for seed, luck in ((0, 0.0), (1, 0.1)):
        for model, general, domain in (
            ("distill", 0.8, 0.1), ("expert", 0.1, 0.7), (REFERENCE, 0.76, 0.64), ("mix", 0.7, 0.5)
        ):  # fmt: skip
            rows += [
                row(model, seed, "general", general + luck * general),
                row(model, seed, "domain", domain),
                row(model, seed, "domain_moved", 0.5),
                row(model, seed, "general_moved", 1.0),
            ]
    rows += [row(REFERENCE, seed, "domain", 0.4, group="noise") for seed in (0, 1)]
    text = tables(rows)
    dae = next(line for line in text.splitlines() if line.startswith(f"| {REFERENCE}"))
    cells = [cell.strip() for cell in dae.strip("|").split("|")]
    assert cells[1] == "2"
    assert cells[4] == "90.0", "(0.64 - 0.1) / (0.7 - 0.1); two that agree have no interval"
    assert cells[5] == "95.0", "0.76 / 0.8, whatever the seed's luck"
    assert cells[6:8] == ["–", "–"]
    assert cells[8:10] == ["0.000", "0.693"], "general, domain: nats of exp(−KL)"
    assert cells[11:] == ["1,000", "2"]
    mix = next(line for line in text.splitlines() if line.startswith("| mix"))
    assert "| -14.0 |" in mix
    noise = text[text.index("### noise") :]
    assert "| 50.0 |" in noise, "student and expert are those of the base where it has none"


def test_generation_and_teacher_are_parts_of_the_seconds(tmp_path):
    from evidence import parts_of
    from evidence_tables import tables

    lines = [
        {"step": 1, "generation_seconds": 0.5, "teacher_seconds": 0.25},
        {"step": 1, "evaluation": {}},
        {"step": 2, "generation_seconds": 1.0, "teacher_seconds": 0.25},
    ]
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    parts = parts_of(tmp_path)
    assert parts == {"generation_seconds": 1.5, "teacher_seconds": 0.5}
    assert parts_of(tmp_path / "none") == {}
    own = row("own", 0, "general", 0.7) | {part: str(value) for part, value in parts.items()}
    told = {
        line.split("|")[1].strip(): line
        for line in tables([row("mix", 0, "general", 0.7), own]).splitlines()
        if "|" in line
    }
    assert told["own"].endswith("| 2 | 60 | 20 |"), "of 2.5 seconds"
    assert told["mix"].endswith("| 2 | – | – |")


def test_the_front_is_told_by_paired_intervals():
    from evidence_tables import tables

    scores = {  # general and domain, and how far seeds differ
        "best": (0.9, 0.8, 0.05),
        "worse": (0.83, 0.8, 0.048),
        "other": (0.95, 0.2, 0.05),
        "noisy": (0.88, 0.79, 0.03),
    }
    rows = [
        row(model, seed, task, score + luck * seed)
        for model, (general, domain, luck) in scores.items()
        for seed in (0, 1, 2)
        for task, score in (("general", general), ("domain", domain))
    ]
    told = {
        line.split("|")[1].strip(): line.split("|")[-4].strip()
        for line in tables(rows).splitlines()
        if "|" in line
    }
    assert told["best"] == "nobody"
    assert told["worse"] == "best", (
        "worse under every seed by much the same, and as good in the other"
    )
    assert told["other"] == "nobody", "better in one"
    assert told["noisy"] == "nobody", "its seeds differ otherwise, so the interval holds zero"


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
