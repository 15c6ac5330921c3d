"""A stage learns the same wherever its teachers lie, unless their weights are rounded."""

from __future__ import annotations

from pathlib import Path

import pytest

from dominie.models.spec import Model
from dominie.models.weights import weights_fingerprint
from dominie.recipe import load_recipe
from dominie.stages.fingerprint import making_parts, model_fingerprint, training_parts
from dominie.stages.run_folder import RunFolder

RECIPE = Path(__file__).parents[1] / "recipes" / "ranks.yaml"
PLACEMENTS = {"cpu": False, "sharded": False, "8bit": True, "4bit": True}


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
