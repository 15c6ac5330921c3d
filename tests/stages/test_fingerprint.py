"""Fingerprints: what a stage depends on, wherever its teachers are placed; changes by name."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from dominie.core.display import Display
from dominie.models.spec import Model
from dominie.models.weights import weights_fingerprint
from dominie.recipe import load_recipe
from dominie.stages.fingerprint import (
    changes,
    making_dependencies,
    making_parts,
    model_fingerprint,
    moved,
    training_dependencies,
    training_parts,
)
from dominie.stages.prepare import Preparation
from dominie.stages.run_folder import RunFolder
from dominie.toyworld.toy_models import save_model

TRAIN = {"learning_rate": 1e-3, "max_length": 64, "lora": None, "arguments": {"warmup_steps": 3}}
SOURCES = {"d": {"share": 1.0, "loss": {"next_token": {"weight": 1.0}}, "rows": "r1"}}

RECIPE = Path(__file__).parents[1] / "recipes" / "ranks.yaml"
PLACEMENTS = {"cpu": False, "sharded": False, "8bit": True, "4bit": True}


def depends(
    train: dict | None = None, tokenizer: str = "t1", rows: str = "r1", student: str = "s1"
):
    sources = {"d": {**SOURCES["d"], "rows": rows}}
    return training_dependencies({**TRAIN, **(train or {})}, student, sources, tokenizer)


@pytest.mark.parametrize(
    ("now", "told"),
    [
        ({}, []),
        ({"train": {"learning_rate": 2e-3}}, ["train.learning_rate: 0.001 before, 0.002 now"]),
        ({"train": {"arguments": {}}}, ["train.warmup_steps: 3 before, nothing now"]),
        ({"train": {"lora": {"r": 4}}}, ["train.lora.r: nothing before, 4 now"]),
        ({"rows": "r2"}, ["data.d.rows: other conversations, or another order of them"]),
        (
            {"rows": "r2", "tokenizer": "t2"},
            ["tokenizer: another tokenizer or chat template"],
        ),
        (
            {"rows": "r2", "train": {"max_length": 32}},
            ["train.max_length: 64 before, 32 now"],
        ),
        ({"student": "s2"}, ["student: another model, or other weights"]),
    ],
)
def test_the_cause_is_told(now, told):
    before = json.loads(json.dumps(depends()))  # as stage.json gives it back
    assert changes(before, depends(**now)) == told


@pytest.mark.parametrize("kind", ["cross_entropy", "dft"])
def test_a_setting_that_came_later_counts_where_it_is_set(kind):
    recipe = load_recipe(RECIPE.with_name("five.yaml"))
    models = {n: n for n in (*recipe.models, "toyworld:student", *recipe.stages)}
    changed = load_recipe(
        RECIPE.with_name("five.yaml"), [f"stages.expert.loss.next_token={{kind: {kind}}}"]
    )
    before, now = (
        training_parts(each, "expert", rows={"shop": "r"}, models=models)
        for each in (recipe, changed)
    )
    told = changes(training_dependencies(*before, "t"), training_dependencies(*now, "t"))
    later = ["data.shop.loss.next_token.kind: nothing before, dft now"]
    assert told == (later if kind == "dft" else [])


def test_many_changes_are_counted():
    many = {f"key{n}": n for n in range(9)}
    told = changes(depends(), depends(train=many))
    assert len(told) == 7
    assert told[-1] == "3 more"


def test_what_a_merge_reads_is_told():
    before = making_dependencies({"merge": {"method": "linear"}}, ["a", "b"])
    now = making_dependencies({"merge": {"method": "linear"}}, ["a", "c"])
    assert changes(before, now) == ["model 2: another model, or other weights"]


def test_what_runs_it_is_told_where_it_is_known():
    now = {"ranks": 2, "versions": {"torch": "2.13", "new": "1"}}
    before = {"ranks": 1, "versions": {"torch": "2.12"}, "status": "running"}
    assert moved(before, now) == ["ranks 2 (begun with 1)", "torch 2.13 (begun with 2.12)"]
    assert moved({}, now) == []


@pytest.fixture
def recipe(tmp_path) -> Path:
    rows = [
        {
            "messages": [
                {"role": "user", "content": f"copy {n}"},
                {"role": "assistant", "content": "red"},
            ]
        }
        for n in range(40)
    ]
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    save_model("student", tmp_path / "m", seed=0)
    (tmp_path / "r.yaml").write_text(
        "data: {d: {path: d.jsonl, validation_fraction: 0.3}}\n"
        "train: {steps: 2, batch: 4, max_length: 64}\n"
        "stages: {s: {student: m, data: {d: 1.0}, loss: {next_token: 1.0}}}\n"
    )
    return tmp_path / "r.yaml"


@pytest.mark.parametrize("keep", ["last", "best"])
def test_rows_that_choose_the_model_count_as_those_it_learns(recipe, tmp_path, keep):
    """The answer of a held-out prompt is another: the prompt stays in its split."""

    def fingerprint() -> tuple[str, str]:
        folder = RunFolder(load_recipe(recipe, [f"train.keep={keep}"]), tmp_path / "runs")
        (prepared,) = Preparation(folder, Display()).all()
        rows = prepared.sources["d"]  # type: ignore[attr-defined]
        return prepared.fingerprint, rows.train.digest

    before = fingerprint()
    from dominie.data.sources import read_split

    source = RunFolder(load_recipe(recipe), tmp_path / "runs").source("d")
    held_out = read_split(dataclasses.replace(source), "validation")[0].messages[0]["content"]
    lines = (tmp_path / "d.jsonl").read_text().splitlines()
    changed = [x.replace('"red"', '"blue"') if f'"{held_out}"' in x else x for x in lines]
    assert changed != lines
    (tmp_path / "d.jsonl").write_text("\n".join(changed) + "\n")
    after = fingerprint()
    assert after[1] == before[1], "what is learnt is the same"
    assert (after[0] == before[0]) == (keep == "last")


@pytest.mark.parametrize(("placement", "rounds"), PLACEMENTS.items())
def test_a_model_s_fingerprint(tmp_path, placement, rounds):
    (tmp_path / "config.json").write_text("{}")
    plain, placed = (Model(path=str(tmp_path), placement=each) for each in (None, placement))
    for fingerprint in (model_fingerprint, weights_fingerprint):
        assert (fingerprint(placed) != fingerprint(plain)) is rounds


@pytest.mark.parametrize(("placement", "rounds"), PLACEMENTS.items())
def test_a_stage_taught_by_another_stage_s_model(tmp_path, placement, rounds):
    models = {"distill": "d", "teacher": "t", "toyworld:student": "s"}
    rows = {"general": "g", "domain": "d"}
    plain = load_recipe(RECIPE)
    placed = load_recipe(RECIPE, [f"stages.teacher.placement={placement}"])
    own, other = (
        [training_parts(recipe, name, rows=rows, models=models) for recipe in (plain, placed)]
        for name in ("distill", "align")
    )
    assert (own[0] != own[1]) is (other[0] != other[1]) is rounds
    learnt = training_parts(placed, "teacher", rows=rows, models={"toyworld:teacher": "m"})
    assert learnt == training_parts(plain, "teacher", rows=rows, models={"toyworld:teacher": "m"})
    folder = RunFolder(placed, tmp_path)
    assert folder.teacher("teacher").placed == placement
    assert folder.model("teacher").placed == "device", "as a student, and where it is evaluated"


def test_a_teacher_s_micro_batch_and_a_made_model_s_placement():
    parts = []
    for more in ([], ["train.teacher_micro_batch=4", "stages.two.placement=sharded"]):
        upcycle = "stages.two={upcycle: {model: toyworld:student, experts: 2}}"
        recipe = load_recipe(RECIPE, [upcycle, *more])
        rows, models = {"general": "g"}, {"teacher": "t", "toyworld:student": "s"}
        parts.append(training_parts(recipe, "distill", rows=rows, models=models))
        parts.append(making_parts(recipe, "two", models))
    assert parts[:2] == parts[2:]


def test_a_cached_stage_is_a_cache_where_predictions_are_all_that_is_compared():
    recipe = load_recipe(RECIPE, ["stages.teacher.placement=cached"])
    align = recipe.stages["align"]
    assert align.cache_on("domain") is None, "attention is compared"
    recipe = load_recipe(RECIPE, ["stages.distill.placement=cached"])
    assert recipe.stages["align"].cached == ["general"]
