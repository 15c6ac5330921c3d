"""`dominie plan`: the paper's recipes, the JSON contract, the exit status."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dominie.planning.plan import machine, plan_recipe
from dominie.planning.plan_output import as_json, as_lines, misfit
from dominie.recipe import load_recipe

RECIPES = Path(__file__).parents[2] / "recipes"


def plan_of(name: str, *overrides: str, **options: object):
    return plan_recipe(load_recipe(RECIPES / name, overrides), machine(**options))


def test_the_papers_run_fits_on_eight_gpus_of_80_gb_and_not_on_one():
    stages = as_json(plan_of("mistral-7b.yaml", gpus=8, memory=80))["stages"]
    assert list(stages) == ["distill", "expert", "align"]
    assert all(stage["fits"] for stage in stages.values())
    assert stages["distill"]["parameters"] == 7_241_732_096
    assert stages["distill"]["trainable_parameters"] == 7_241_732_096
    assert stages["distill"]["teachers"]["mixtral"]["parameters"] == 46_702_792_704
    alone = plan_of("mistral-7b.yaml", gpus=1, memory=80)
    assert not any(stage.fits for stage in alone.stages.values())
    error = misfit(alone)
    assert error is not None
    assert error.exit_status == 2
    assert "stages.distill.train.lora" in str(error), "what would make it fit"


def test_the_adapters_run_fits_on_one_h200_and_holds_one_base():
    plan = plan_of("mistral-7b-lora.yaml", gpu="h200")
    assert plan.fits
    stages = plan.stages
    assert stages["distill"].teachers["mixtral"].parameters == 46_702_792_704
    assert stages["distill"].peak > 46_702_792_704 * 2 + 7_241_732_096 * 2
    minds = stages["align"].memory.items["teacher weights"]
    assert minds == 4 * stages["expert"].memory.traced.trainable  # the expert's adapter, no more


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_recipe_is_planned_without_a_network(path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    recipe = load_recipe(path)
    plan = plan_recipe(recipe, machine(gpu="h200"))
    assert set(plan.stages) == set(recipe.stages)
    assert all(stage.peak > 0 for stage in plan.stages.values())
    assert any("all stages" in line for line in as_lines(plan))


def test_json_is_one_object_and_a_misfit_leaves_with_2(recipe, monkeypatch, capsys):
    from dominie import cli

    for memory, status in (("80", 0), ("0.001", 2)):
        monkeypatch.setattr(
            "sys.argv",
            ["dominie", "plan", str(recipe), "--gpu", "a100", "--memory", memory, "--json"],
        )
        with pytest.raises(SystemExit) as left:
            cli.main()
        assert left.value.code == status
        said = capsys.readouterr()
        stage = json.loads(said.out)["stages"]["s"]
        assert stage["fits"] == (status == 0)
        assert {"parameters", "peak_gb", "fits", "memory", "hours", "flops_per_token"} <= set(stage)
        assert sum(stage["memory"].values()) == pytest.approx(stage["peak_gb"], abs=2e-3)
        if status:
            assert "error: r: stage s does not fit" in said.err
            assert "Traceback" not in said.err


def test_sizes_are_counted_where_the_data_are(models, tmp_path):
    rows = [{"prompt": "x " * 40, "completion": "y " * 60} for _ in range(1200)]
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    stage = {"student": str(models / "student"), "data": {"d": 1.0}, "loss": {"next_token": 1.0}}
    recipe = {
        "data": {"d": {"path": "d.jsonl", "test_fraction": 0.25}},
        "train": {"batch": 9, "epochs": 1},
        "stages": {"s": stage},
    }
    path = tmp_path / "r.yaml"
    path.write_text(json.dumps(recipe))
    work = plan_recipe(load_recipe(path), machine(gpu="h100")).stages["s"].work
    assert work.known
    assert work.steps == 100
    assert 50 * 900 < work.tokens < 80 * 900
