"""A student cut from its teacher: made, recorded, taught with the layers that it kept, refused."""

from __future__ import annotations

import json
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from tiny import tiny_config, tiny_folder
from transformers import AutoModelForCausalLM

from dominie.core.display import Display
from dominie.core.errors import InputError
from dominie.models import pruned_weights
from dominie.planning.plan import machine, plan_recipe
from dominie.planning.plan_output import as_json
from dominie.recipe import dump_recipe, load_recipe
from dominie.stages.prepare import Preparation
from dominie.stages.run_folder import RunFolder
from dominie.toyworld.toy_models import word_tokenizer
from dominie.training import stage_sources, train_stage
from dominie.workflows.pipeline import run_recipe

RECIPE = """
name: cut
models: {big: "toyworld:teacher?layers=7"}
data:
  general: {path: "toyworld:general?rows=60", validation_fraction: 0.2}
train: {steps: 1, batch: 4, max_length: 64}
stages:
  small: {prune: {model: big, layers: 5, keep: influence, source: general, rows: 9}}
  distill:
    student: small
    teacher: big
    data: {general: 1.0}
    loss: {prediction: 1.0, attention: {weight: 1.0, layers: kept}}
  further:
    student: distill
    teacher: big
    data: {general: 1.0}
    loss: {prediction: 1.0, attention: {weight: 1.0, layers: kept}}
    train: {lora: {r: 2}}
  smaller: {prune: {model: small, layers: 3}}
  last:
    student: smaller
    teacher: small
    data: {general: 1.0}
    loss: {prediction: 1.0, attention: {weight: 1.0, layers: kept}}
"""


def run(recipe: Path, *overrides: str) -> str:
    """Run a recipe beside its file; what was printed."""
    out = StringIO()
    display = Display(Console(file=out, width=400, color_system=None))
    run_recipe(load_recipe(recipe, overrides), recipe.parent / "runs", display)
    return out.getvalue()


def record(recipe: Path, stage: str) -> dict[str, Any]:
    file = recipe.parent / "runs" / "cut" / stage / "stage.json"
    found: dict[str, Any] = json.loads(file.read_text())
    return found


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    (tmp_path / "cut.yaml").write_text(RECIPE)
    return tmp_path / "cut.yaml"


@pytest.fixture
def first(tmp_path: Path) -> Path:
    """The recipe with nothing but its first stage."""
    (tmp_path / "first").mkdir()
    (tmp_path / "first" / "cut.yaml").write_text(RECIPE.partition("  distill:")[0])
    return tmp_path / "first" / "cut.yaml"


def test_a_student_is_cut_and_taught_with_the_layers_it_kept(recipe, first, monkeypatch):
    compared: list[list[tuple[int, int]]] = []

    def pairs(*arguments: Any) -> Any:
        found = stage_sources.attention_pairs(*arguments)
        compared.append(list(found.pairs))
        return found

    monkeypatch.setattr(train_stage, "attention_pairs", pairs)
    recipe.write_text(RECIPE.partition("  last:")[0])
    printed = run(recipe)
    made = record(recipe, "small")
    kept = made["kept_layers"]
    assert (made["kind"], made["layers_before"], len(kept)) == ("prune", 7, 5)
    angles = {int(start): angle for start, angle in made["angles"].items()}
    assert list(angles) == [2, 3]
    start = min(angles, key=lambda first: angles[first])
    assert kept == [n for n in range(7) if n not in (start, start + 1)]
    assert made["loss_before"] > 0
    assert made["loss_after"] != made["loss_before"]
    assert f"big with 5 of its 7 layers (0-{start - 1}, {start + 2}-6)" in printed
    assert f"next-token loss {made['loss_after']:.3f} nats before recovery" in printed
    assert record(recipe, "smaller")["kept_layers"] == [0, 2, 4]
    assert "loss_after" not in record(recipe, "smaller")
    taught = list(enumerate(kept))
    assert compared == [taught, taught]
    folder = recipe.parent / "runs" / "cut"
    model = AutoModelForCausalLM.from_pretrained(folder / "small" / "model")
    assert model.num_parameters() == made["parameters"]
    assert (folder / "small" / "model" / "tokenizer.json").exists()
    whole = json.loads((folder / "small" / "model" / "generation_config.json").read_text())
    assert whole["eos_token_id"]
    card = (folder / "small" / "model" / "README.md").read_text()
    assert "A model that began as `toyworld:teacher?layers=7`" in card
    assert "- pruned" in card
    assert "| prune: general |" in card
    run(first)
    assert record(first, "small")["angles"] == made["angles"]
    for name in ("model.safetensors", "config.json"):
        again = first.parent / "runs" / "cut" / "small" / "model" / name
        assert again.read_bytes() == (folder / "small" / "model" / name).read_bytes()


def test_a_stage_that_was_cut_off_begins_again(first, monkeypatch):
    settings = ("layers=[0, 6]", "keep=null", "source=null")
    overrides = [f"stages.small.prune.{setting}" for setting in settings]

    def broken(*arguments: Any) -> None:
        really(*arguments)
        raise KeyboardInterrupt

    really = pruned_weights.write_weights
    monkeypatch.setattr(pruned_weights, "write_weights", broken)
    with pytest.raises(KeyboardInterrupt):
        run(first, *overrides)
    assert record(first, "small")["status"] == "running"
    assert not (first.parent / "runs" / "cut" / "small" / "model").exists()
    monkeypatch.setattr(pruned_weights, "write_weights", really)
    assert "big with 2 of its 7 layers (0, 6), " in run(first, *overrides)
    assert "small already made" in run(first, *overrides)
    assert record(first, "small")["status"] == "done"


def test_check_and_plan_know_its_size_before_it_exists(recipe, first):
    loaded = load_recipe(recipe)
    (recipe.parent / "again.yaml").write_text(dump_recipe(loaded))
    assert load_recipe(recipe.parent / "again.yaml").stages == loaded.stages
    folder = RunFolder(loaded, recipe.parent / "runs")
    layers = {name: folder.info(name).layers for name in loaded.stages}
    assert layers == {"small": 5, "distill": 5, "further": 5, "smaller": 3, "last": 3}
    narrow = "layers: 2, heads: 2, hidden_size: 48, experts: 2, source: general"
    more = f"stages.two={{prune: {{model: small, {narrow}}}}}"
    plan = plan_recipe(load_recipe(first, [more]), machine(gpu="h100"))
    stages = as_json(plan)["stages"]
    assert {name: stages[name]["kind"] for name in stages} == {"small": "prune", "two": "prune"}
    assert plan.stages["small"].weights > 4 * 1.3 * stages["small"]["parameters"], "the larger runs"
    assert not (first.parent / "runs" / "cut" / "small").exists()
    printed = run(first, more)
    made = record(first, "two")
    assert "small with 2 of its 5 layers (0, 4), heads 2 of 4, hidden_size 48 of 96, " in printed
    assert made["widths"] == {"heads": [4, 2], "hidden_size": [96, 48], "experts": [4, 2]}
    assert [len(kept) for kept in made["kept_experts"]] == [2, 2]
    assert [len(kept) for kept in made["kept_key_heads"]] == [1, 1]
    assert {name: record(first, name)["parameters"] for name in ("small", "two")} == {
        name: stages[name]["parameters"] for name in ("small", "two")
    }


def test_without_held_out_conversations_it_says_that_nothing_is_measured(recipe):
    out = StringIO()
    display = Display(Console(file=out, width=400, color_system=None))
    loaded = load_recipe(recipe, ["data.general.validation_fraction=0"])
    Preparation(RunFolder(loaded, recipe.parent / "runs"), display).stage("small")
    assert "small: general holds nothing out for validation" in out.getvalue()


def prepare(recipe: Path, overrides: list[str]) -> None:
    folder = RunFolder(load_recipe(recipe, overrides), recipe.parent / "runs")
    Preparation(folder, Display(Console(quiet=True))).all()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["stages.small.prune.layers=8"], r"stages\.small\.prune\.layers"),
        (["stages.small.prune.layers=7"], "nothing is left out"),
        (["stages.small.prune.layers=[0, 7]", "stages.small.prune.keep=null"], "from 0 to 6"),
        (["stages.small.prune.layers=[1, 1]", "stages.small.prune.keep=null"], "none twice"),
        (["stages.small.prune.source=null"], "needs a source"),
        (["stages.small.prune.intermediate_size=8"], "made narrower"),
        (["stages.small.prune.source=genral"], "did you mean general"),
        (["stages.small.prune.kept=uniform"], "unknown key"),
        (["stages.small.prune.keep=best"], "uniform"),
        (["data.general.test_fraction=0.8"], "holds all conversations out"),
        (["stages.distill.student=big"], "a student that a prune stage made"),
        (["stages.last.teacher=distill", "stages.smaller.prune.layers=2"], None),
        (["stages.last.teacher=other", "models.other=toyworld:teacher?layers=6"], "of 6 layers"),
        (["models.big=gemma"], "architecture cannot be pruned"),
        (["models.big=quantised"], "before it was quantised"),
        (["models.big=images"], "read more than text"),
        (
            ["stages.smaller.prune.model=further", "stages.further.train.lora.merge=false"],
            "an adapter cannot be pruned",
        ),
    ],
)
def test_what_cannot_be_cut_or_paired_is_one_message(recipe, overrides, message, monkeypatch):
    monkeypatch.chdir(recipe.parent)
    changed: dict[str, dict[str, Any]] = {
        "gemma": {},
        "quantised": {"quantization_config": {"quant_method": "bitsandbytes"}},
        "images": {
            "model_type": "gemma3",
            "text_config": tiny_config("gemma3_text", num_hidden_layers=7).to_dict(),
        },
    }
    for name, settings in changed.items():
        if f"models.big={name}" in overrides:
            family = "gemma2" if name == "gemma" else "llama"
            saved_with_tokens(recipe.parent / name, family, settings)
    if message is None:
        prepare(recipe, overrides)
        return
    with pytest.raises(InputError, match=message):
        prepare(recipe, overrides)


def saved_with_tokens(folder: Path, family: str, settings: dict[str, Any]) -> None:
    tokenizer = word_tokenizer()
    tiny_folder(folder, family, vocab_size=len(tokenizer), num_hidden_layers=7)
    tokenizer.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | settings))
