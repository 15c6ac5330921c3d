"""Model cards: what is in them, what is kept out of them, and when they are written."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from dominie.models.spec import Model
from dominie.recipe import load_recipe
from dominie.stages.fingerprint import model_fingerprint
from dominie.stages.run_folder import RunFolder, write_stage
from dominie.workflows.model_card import write_cards

RECIPE = """
name: shop
models:
  local: {path: base}
  big: {path: org/big-teacher}
data:
  general: {path: org/chats}
  domain: {path: rows.jsonl}
train: {steps: 2, batch: 4, max_length: 64}
stages:
  distill:
    {student: local, teacher: big, data: {general: 1.0}, loss: {prediction: 1.0, attention: 2.0}}
  expert: {student: distill, data: {domain: 1.0}, loss: {next_token: 1.0}}
  align:
    student: distill
    data: {domain: {share: 0.1, teacher: expert}, general: {share: 0.9, teacher: distill}}
    loss: {prediction: 1.0}
  merged: {merge: {models: {distill: 0.5, expert: 0.5}}}
evaluate:
  models: {before: distill, after: align}
  tasks: {t: {source: domain, split: validation}}
"""
SCORE = {"score": 0.25, "stderr": 0.1, "n": 20, "interval": [0.1, 0.4], "metric": "exact_match"}
RESULTS = {"before": {"t": {**SCORE, "score": 0.125}}, "after": {"t": SCORE}}
RECORD = {
    "status": "done",
    "fingerprint": "f",
    "steps": 1234,
    "supervised_tokens": 56789,
    "seconds": 9.0,
    "data": {"domain": {"read": 4321, "train": 4000, "share": 0.1, "token_share": 0.2}},
    "final": {"evaluation": {"domain": {"loss": 0.5, "divergence": 0.25, "tokens": 77}}},
    "versions": {"dominie": "0.1.0"},
}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A run whose stages are all done, on a base of its own licence."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").write_text("{}")
    (tmp_path / "base" / "README.md").write_text("---\nlicense: mit\n---\n# Base\n")
    (tmp_path / "rows.jsonl").write_text("")
    text = RECIPE.replace("path: rows.jsonl", "path: rows.jsonl, validation_fraction: 0.1")
    (tmp_path / "shop.yaml").write_text(text)
    made = RunFolder(load_recipe(tmp_path / "shop.yaml"), tmp_path / "runs")
    for name in made.recipe.stages:
        (made.stage(name) / "model").mkdir(parents=True)
        (made.stage(name) / "model" / "config.json").write_text("{}")
        write_stage(made.stage(name), {"name": name, **RECORD})
    return made


def card(folder: RunFolder, name: str) -> Path:
    return folder.stage(name) / "model" / "README.md"


def test_a_card_has_lineage_data_losses_and_figures(folder):
    (folder.path / "results.json").write_text(json.dumps(RESULTS))
    assert len(write_cards(folder, scored=True)) == 4
    loaded = ModelCard.load(card(folder, "align"))
    data = loaded.data.to_dict()
    assert data["license"] == "mit"
    assert "base_model" not in data  # a folder is nothing that the hub could link to
    assert data["datasets"] == ["org/chats"]
    assert data["library_name"] == "transformers"
    assert "domain-alignment-from-expert" in data["tags"]
    (result,) = loaded.data.eval_results
    assert (result.metric_type, result.metric_value) == ("exact_match", 0.25)
    assert result.dataset_name == "domain validation"
    text = loaded.text
    assert "| t | exact_match | 25.0 (10.0 to 40.0) | 20 | 12.5 (10.0 to 40.0) |" in text
    assert "| distill | base | general (1) | org/big-teacher | 1 prediction + 2 attention |" in text
    assert "| align | distill | domain (0.1) | expert | 1 prediction |" in text
    assert "| domain | 4,321 |" in text
    assert "1,234 optimiser steps over 56,789 supervised tokens" in text
    assert "| domain | 0.500 |  | 0.250 |  | 77 |" in text
    assert "dominie 0.1.0" in text
    assert "The licence of the teacher org/big-teacher could not be read" in text


def test_a_card_tells_how_far_a_stage_moved_and_why_it_stopped(folder):
    found = {"loss": 0.5, "tokens": 77, "forgetting": 0.0421}
    record = {**RECORD, "final": {"evaluation": {"domain": found}}, "stopped": {"why": "too far"}}
    write_stage(folder.stage("align"), {"name": "align", **record})
    moved = {"score": 0.5, "interval": [0.25, 0.8], "kl": 0.693, "metric": "forgetting", "n": 20}
    (folder.path / "results.json").write_text(json.dumps({"after": {"t": moved}}))
    write_cards(folder, scored=True)
    loaded = ModelCard.load(card(folder, "align"))
    assert "in 9 s. Stopped by `train.stop_at`: too far." in loaded.text
    assert "agreement with it | KL from the start | tokens |" in loaded.text
    assert "| domain | 0.500 |  |  |  | 0.042 | 77 |" in loaded.text
    assert "| t | forgetting | KL 0.693 nats (0.223 to 1.39) | 20 |" in loaded.text
    (result,) = loaded.data.eval_results
    assert (result.metric_type, result.metric_value) == ("kl", 0.693)
    assert "KL from the start" not in card(folder, "expert").read_text()


def test_nothing_of_this_machine_gets_out_and_the_recipe_is_one(folder, tmp_path):
    write_cards(folder, scored=True)
    for name in folder.recipe.stages:
        assert str(tmp_path) not in card(folder, name).read_text()
    inside = card(folder, "align").read_text().split("```yaml\n")[1].split("```")[0]
    (tmp_path / "again.yaml").write_text(inside)
    again = load_recipe(tmp_path / "again.yaml")
    assert list(again.stages) == ["distill", "expert", "align"]
    assert again.stages["align"].teacher_on("domain") == "expert"


def test_a_hub_student_is_the_base_model(folder, tmp_path):
    text = (tmp_path / "shop.yaml").read_text().replace("{path: base}", "{path: org/small}")
    (tmp_path / "shop.yaml").write_text(text)
    hub = RunFolder(load_recipe(tmp_path / "shop.yaml"), tmp_path / "runs")
    (hub.stage("align") / "model" / "adapter_config.json").write_text("{}")
    write_cards(hub, scored=True)
    relations = {}
    for name in ("distill", "merged", "align"):
        data = ModelCard.load(card(hub, name)).data.to_dict()
        assert data["base_model"] == "org/small"
        assert "license" not in data
        relations[name] = (data["base_model_relation"], data["library_name"])
    assert relations == {
        "distill": ("finetune", "transformers"),
        "merged": ("merge", "transformers"),
        "align": ("adapter", "peft"),
    }
    assert "The licence of org/small" in card(hub, "align").read_text()


def test_figures_come_when_models_are_scored_and_never_of_an_earlier_model(folder):
    (folder.path / "results.json").write_text(json.dumps(RESULTS))
    assert len(write_cards(folder, scored=False)) == 4
    assert "not been evaluated" in card(folder, "align").read_text()
    assert write_cards(folder, scored=False) == []
    write_cards(folder, scored=True)
    assert "25.0 (10.0 to 40.0)" in card(folder, "align").read_text()
    assert "not been evaluated" in card(folder, "expert").read_text()


def test_a_card_that_was_taken_over_stays_and_a_form_is_filled_in(folder):
    card(folder, "align").write_text("mine")
    card(folder, "expert").write_text("# peft\n[More Information Needed]\n")
    write_stage(folder.stage("distill"), {**RECORD, "status": "running"})
    written = write_cards(folder, scored=True)
    assert written == [card(folder, "expert"), card(folder, "merged")]
    assert card(folder, "align").read_text() == "mine"


def test_a_card_changes_no_fingerprint(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    before = model_fingerprint(Model(path=str(tmp_path)))
    (tmp_path / "README.md").write_text("a card")
    assert model_fingerprint(Model(path=str(tmp_path))) == before
    (tmp_path / "config.json").write_text("{ }")
    assert model_fingerprint(Model(path=str(tmp_path))) != before
