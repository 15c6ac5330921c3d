"""Recipes over small configurations, planned without weights or data."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from dominie.planning.plan import Plan, machine, plan_recipe
from dominie.recipe import load_recipe

SMALL = {
    "model_type": "mistral",
    "hidden_size": 64,
    "num_hidden_layers": 6,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 1000,
    "max_position_embeddings": 4096,
    "sliding_window": None,
    "dtype": "float32",
}


@pytest.fixture(scope="session", autouse=True)
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two folders with a configuration and nothing else: a dense student, a mixture as teacher."""
    folder = tmp_path_factory.mktemp("models")
    mixture = {"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2}
    for name, config in (("student", SMALL), ("teacher", {**SMALL, **mixture})):
        (folder / name).mkdir()
        (folder / name / "config.json").write_text(json.dumps(config))
    return folder


Planned = Callable[..., Plan]


@pytest.fixture
def recipe(models: Path, tmp_path: Path) -> Path:
    """The recipe of most tests here, so that what was counted for one serves the others."""
    stage = {
        "student": str(models / "student"),
        "teacher": str(models / "teacher"),
        "data": {"all": 1.0},
        "loss": {"prediction": 1.0, "attention": 1.0},
    }
    tree = {
        "data": {"all": "nowhere.jsonl"},
        "train": {"batch": 64, "micro_batch": 8, "max_length": 128, "packing": False},
        "stages": {"s": stage},
    }
    path = tmp_path / "r.yaml"
    path.write_text(json.dumps(tree))
    return path


@pytest.fixture
def planned(recipe: Path) -> Planned:
    """The plan of a stage `s` that is changed by overrides and planner options."""

    def plan(*overrides: str, tokens: int | None = None, **options: object) -> Plan:
        return plan_recipe(
            load_recipe(recipe, overrides),
            machine(**{"gpu": "h100", **options}),
            conversations=1000,
            tokens=tokens,
        )

    return plan
