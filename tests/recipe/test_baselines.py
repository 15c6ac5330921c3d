"""The recipes of baselines: all of their stages run, in a few steps."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from dominie.core.display import Display
from dominie.recipe import Recipe, load_recipe
from dominie.workflows.pipeline import run_recipe

ROOT = Path(__file__).parents[2]
BASELINES = sorted((ROOT / "recipes" / "baselines").glob("*.yaml"))


def in_few_steps(file: Path) -> Recipe:
    """A recipe with little data and 2 steps for each stage; what is written is drawn."""
    recipe = load_recipe(file)
    overrides = ["train.batch=8", "train.micro_batch=8"]
    for name, source in recipe.data.items():
        path, _, given = source.path.partition("?")
        kept = [part for part in given.split("&") if part and not part.startswith("rows=")]
        rows = 400 if source.test_fraction else 120
        overrides.append(f"data.{name}.path={path}?{'&'.join([*kept, f'rows={rows}'])}")
    for name, stage in recipe.stages.items():
        if stage.trains:
            overrides.append(f"stages.{name}.train.steps=2")
        elif stage.kind == "answers":  # of models that have hardly learnt to end an answer
            overrides.append(f"stages.{name}.answers.temperature=1.0")
            overrides.append(f"stages.{name}.answers.max_new_tokens=64")
    assert recipe.evaluate is not None
    for name, task in recipe.evaluate.tasks.items():
        if task.source is not None:
            overrides.append(f"evaluate.tasks.{name}.limit=2")
    return load_recipe(file, overrides)


@pytest.mark.full
@pytest.mark.timeout(600)
@pytest.mark.parametrize("file", BASELINES, ids=lambda file: file.stem)
def test_every_stage_runs_and_every_model_is_scored(file, tmp_path):
    recipe = in_few_steps(file)
    run = run_recipe(recipe, tmp_path, Display(Console(quiet=True)))
    records: dict[str, Any] = {
        name: json.loads((run / name / "stage.json").read_text()) for name in recipe.stages
    }
    assert {record["status"] for record in records.values()} == {"done"}
    results = json.loads((run / "results.json").read_text())
    assert recipe.evaluate is not None
    assert results.keys() == recipe.evaluate.models.keys()
    assert all(scores.keys() == recipe.evaluate.tasks.keys() for scores in results.values())
    for name in recipe.made:
        counts = records[name]
        asked = counts["prompts"] * recipe.stages[name].answers.samples
        assert counts["conversations"] + sum(counts["dropped"].values()) == asked
        learners = [r["data"][name] for r in records.values() if name in r.get("data", {})]
        assert learners, "its answers are learnt"
        assert {each["read"] for each in learners} == {counts["conversations"]}
