"""An evaluation holds one model and one teacher at a time, and loads none twice needlessly."""

from __future__ import annotations

import gc
import json
import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from dominie.core.display import Display
from dominie.recipe import load_recipe
from dominie.stages import evaluation_models
from dominie.stages.evaluation_models import EvaluationModels, Step, plan_steps
from dominie.workflows.pipeline import evaluate_recipe

RECIPE = """\
name: held
models:
  a: {path: "toyworld:student"}
  b: {path: "toyworld:student"}
  c: {path: "toyworld:student"}
  t: {path: "toyworld:teacher"}
data: {shop: {path: shop.jsonl, test_fraction: 1.0}}
evaluate:
  models: {a: a, b: b, t: t, c: c}
  tasks:
    near: {source: shop, metric: agreement, teacher: t}
    exact: {source: shop, max_new_tokens: 2}
    pick: {source: shop, metric: choice}
    words: {source: shop, metric: token_f1, max_new_tokens: 2}
"""


@pytest.fixture
def recipe(tmp_path) -> Path:
    row = {"prompt": "the red lamp ?", "completion": "red", "options": ["red", "blue"]}
    rows = [row | {"prompt": f"the {thing} ?"} for thing in ("lamp", "desk", "scarf")]
    (tmp_path / "shop.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "held.yaml").write_text(RECIPE)
    return tmp_path / "held.yaml"


def test_two_models_at_most_are_alive_and_each_is_loaded_once(recipe, monkeypatch):
    """The agreement's teacher stays from model to model, and is itself one of the models."""
    alive: list[weakref.ref[Any]] = []
    before: list[int] = []
    loaded: list[str] = []
    original = evaluation_models.load_frozen

    def counted(spec: Any, **options: Any) -> Any:
        gc.collect()
        before.append(sum(model() is not None for model in alive))
        model = original(spec, **options)
        alive.append(weakref.ref(model))
        loaded.append(Path(spec.path).name)
        return model

    monkeypatch.setattr(evaluation_models, "load_frozen", counted)
    evaluate_recipe(load_recipe(recipe), recipe.parent / "runs", Display(Console(quiet=True)))
    assert len(loaded) == 4, "a, t beside it, b, c"
    assert before == [0, 1, 1, 1], "all but the teacher are freed before the next is loaded"
    gc.collect()
    assert not any(model() is not None for model in alive), "and all in the end"


def test_tasks_of_one_teacher_are_neighbours(recipe):
    """Of each model first tasks that need no teacher, then those of the teacher that is held."""
    tasks = "{one: {source: shop, metric: agreement, teacher: t}, plain: {source: shop}, "
    tasks += "two: {source: shop, metric: agreement, teacher: c}, same: {source: shop, by: prompt}}"
    text = RECIPE.split("  models: {a")[0] + f"  models: {{x: a, y: b}}\n  tasks: {tasks}\n"
    recipe.write_text(text)
    evaluation = load_recipe(recipe).evaluate
    assert evaluation is not None
    pending = {"x": ["one", "plain", "two", "same"], "y": ["one", "two"]}
    assert plan_steps(evaluation, pending) == [
        Step("x", ("plain", "same"), None),
        Step("x", ("one",), "t"),
        Step("x", ("two",), "c"),
        Step("y", ("two",), "c"),
        Step("y", ("one",), "t"),
    ]
    assert plan_steps(evaluation, {"x": [], "y": ["same"]}) == [Step("y", ("same",), None)]


def test_what_is_not_kept_is_freed_before_the_load(recipe, monkeypatch):
    order: list[str] = []

    class Fake:
        def __init__(self, name: str) -> None:
            order.append(f"load {name}")
            weakref.finalize(self, order.append, f"free {name}")

    folder = SimpleNamespace(model=lambda name: name, recipe=SimpleNamespace(served={}))
    monkeypatch.setattr(evaluation_models, "load_frozen", lambda spec, device: Fake(spec))
    monkeypatch.setattr(evaluation_models, "ChatTokenizers", lambda *_: None)
    models = EvaluationModels(folder, {}, Display(Console(quiet=True)))
    models.load("a")
    models.load("t", beside="a")
    models.load("a", beside="t")
    models.load("b", beside="t")
    models.load("c")
    models.free()
    assert order[:4] == ["load a", "load t", "free a", "load b"]
    assert set(order[4:6]) == {"free b", "free t"}
    assert order[6:] == ["load c", "free c"]
