"""What `dominie init` writes runs as it stands."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from dominie.cli import app
from dominie.core.errors import InputError
from dominie.core.hardware import device_named, machine
from dominie.recipe import load_recipe
from dominie.training.settings import Lora
from dominie.workflows.init import ROWS, TEMPLATES, start


@pytest.mark.parametrize("template", TEMPLATES)
def test_every_template_is_a_recipe_with_its_data(tmp_path, template):
    written = start(tmp_path / "my shop", template)
    assert {path.name for path in (tmp_path / "my shop").iterdir()} == {p.name for p in written}
    recipe = load_recipe(written[0])
    assert recipe.name == "my-shop"
    assert list(recipe.stages) == list(TEMPLATES[template].stages)
    assert list(recipe.data) == list(TEMPLATES[template].sources)
    for source in recipe.data.values():
        rows = [json.loads(line) for line in Path(source.path).read_text().splitlines()]
        assert len(rows) == ROWS
        assert [turn["role"] for turn in rows[0]["messages"]] == ["user", "assistant"]
    assert {model: model for model in recipe.evaluate.models} == recipe.evaluate.models
    assert list(recipe.stages)[-1] in recipe.evaluate.models
    assert max(map(len, written[0].read_text().splitlines())) <= 110


def test_nothing_is_overwritten(tmp_path):
    start(tmp_path, "kd")
    (tmp_path / "recipe.yaml").unlink()
    before = (tmp_path / "general.jsonl").read_bytes()
    with pytest.raises(InputError, match=r"general.jsonl: there is a file already"):
        start(tmp_path, "kd-dae")
    assert (tmp_path / "general.jsonl").read_bytes() == before
    assert not (tmp_path / "recipe.yaml").exists()


def test_what_cannot_be_is_named(tmp_path):
    with pytest.raises(InputError, match="one of kd, kd-dae"):
        start(tmp_path, "kddae")
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be written"):
        start(tmp_path / "file" / "folder", "kd")


@pytest.fixture
def on(monkeypatch):
    """Sets the machine that a recipe for a given model is written for."""

    def of(memory: float, *, gpu: bool = False) -> None:
        device = device_named("h100" if gpu else "cpu")
        here = dataclasses.replace(machine(), device=device, memory=memory, count=1)
        monkeypatch.setattr("dominie.workflows.init_model.machine", lambda: here)

    return of


@pytest.mark.parametrize(
    ("memory", "gpu", "expected"),
    [
        (80e9, True, {"precision": "bf16", "lora": None, "micro_batch": 8, "steps": 200}),
        (80e9, False, {"precision": "fp32", "lora": None, "micro_batch": 8, "steps": 30}),
        (1, False, {"lora": Lora(r=16, alpha=32), "micro_batch": 1}),
    ],
)
def test_settings_for_a_given_model_follow_from_the_machine(tmp_path, on, memory, gpu, expected):
    on(memory, gpu=gpu)
    written = start(tmp_path / "mine", model="toyworld:student")
    recipe, text = load_recipe(written[0]), written[0].read_text()
    assert list(recipe.stages) == ["expert", "align"]
    assert recipe.models["start"].path == "toyworld:student"
    train = recipe.stages["align"].train
    assert {key: getattr(train, key) for key in expected} == expected
    assert (1e-4 <= train.learning_rate <= 2e-3) == (train.lora is None)
    assert ("DOES NOT FIT" in text) == (memory == 1)
    for key in ("precision", "learning_rate", "max_length", "batch", "micro_batch", "steps"):
        (line,) = [line for line in text.splitlines() if line.strip().startswith(f"{key}:")]
        assert " # " in line, "every choice says why"
    assert max(map(len, text.splitlines())) <= 110


@pytest.mark.full
def test_a_given_model_larger_than_the_machine_gets_adapters(tmp_path, on):
    """A 7B by its shipped configuration: in full it wants 16 bytes a weight."""
    on(60e9, gpu=True)
    recipe = load_recipe(start(tmp_path / "big", model="mistralai/Mistral-7B-v0.1")[0])
    train = recipe.stages["align"].train
    assert train.lora is not None
    assert train.learning_rate == pytest.approx(2e-4)
    assert recipe.models["start"].quantize is None


def test_a_given_model_is_aligned_and_nothing_else(tmp_path):
    with pytest.raises(InputError, match="dae, or no --template"):
        start(tmp_path / "x", "kd", model="toyworld:student")
    assert not (tmp_path / "x").exists()
    with pytest.raises(InputError):
        start(tmp_path / "x", model=str(tmp_path / "missing.gguf"))
    assert not (tmp_path / "x").exists()


@pytest.mark.full
def test_the_recipe_for_a_given_model_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    app(["init", "first", "--model", "toyworld:student"], standalone_mode=False)
    app(["run", "first/recipe.yaml", "train.steps=2"], standalone_mode=False)
    results = json.loads((tmp_path / "runs" / "first" / "results.json").read_text())
    assert set(results["align"]) == {"general", "domain", "forgotten"}


@pytest.mark.parametrize("template", ["kd-dae", "2x7b"])
def test_it_runs(tmp_path, monkeypatch, capsys, template):
    monkeypatch.chdir(tmp_path)
    app(["init", "first", "--template", template], standalone_mode=False)
    assert "next: dominie check first/recipe.yaml" in capsys.readouterr().out
    app(["check", "first/recipe.yaml"], standalone_mode=False)
    small = ["train.steps=2", "stages.taught.train.steps=2"]
    app(["run", "first/recipe.yaml", *small], standalone_mode=False)
    results = json.loads((tmp_path / "runs" / "first" / "results.json").read_text())
    assert set(results["align"]) == {"general", "domain"}
