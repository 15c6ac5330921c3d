"""Adapters over one base cost their own weights, and router losses what they look at."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import MixtralConfig

from dominie.core.errors import InputError
from dominie.losses.router_losses import Conversations, Routing, router_loss
from dominie.models.info import ModelInfo
from dominie.planning import plan
from dominie.planning.plan import machine, plan_recipe
from dominie.planning.trace import router_loss_memory
from dominie.recipe import load_recipe

UNMERGED = {"r": 4, "merge": False}


@pytest.fixture
def teacher_weights(models, tmp_path):
    """Bytes of the teachers of a stage whose student is an adapter, or goes on from one."""

    def found(student: str, *, merge: bool, gpus: int = 1) -> tuple[float, float]:
        base, next_token = str(models / "student"), {"next_token": 1.0}
        over = {
            "student": base,
            "data": {"a": 1.0},
            "loss": next_token,
            "train": {"lora": UNMERGED},
        }
        learn = {
            "student": student or base,
            "data": {
                "a": {"share": 0.4, "teacher": "one"},
                "b": {"share": 0.3, "teacher": "two"},
                "c": {"share": 0.3, "teacher": base},
            },
            "loss": {"prediction": 1.0},
            "train": {"lora": {"r": 4, "merge": merge}},
        }
        recipe = {
            "data": dict.fromkeys("abc", "nowhere.jsonl"),
            "train": {"batch": 8, "max_length": 32},
            "stages": {"one": over, "two": over, "learn": learn},
        }
        path = tmp_path / "recipe.yaml"
        path.write_text(json.dumps(recipe))
        stages = plan_recipe(
            load_recipe(path), machine(gpu="h100", gpus=gpus), conversations=100
        ).stages
        adapter = 4.0 * stages["one"].memory.traced.trainable
        return stages["learn"].memory.items.get("teacher weights", 0.0), adapter

    return found


@pytest.mark.parametrize("student", ["", "one"])
def test_a_base_under_several_adapters_is_held_once(teacher_weights, student):
    found, adapter = teacher_weights(student, merge=False)
    assert found == 2 * adapter, "the two teachers', and nothing for the base alone"


def test_a_base_that_an_adapter_is_merged_into_is_no_teacher_of_its_own(teacher_weights, models):
    found, _ = teacher_weights("one", merge=True)
    config = json.loads((models / "student" / "config.json").read_text())
    embeddings = 2 * config["vocab_size"] * config["hidden_size"]
    assert found > 2 * 4 * embeddings, "a base for `two` and one for the base"
    alone, adapter = teacher_weights("", merge=True)
    assert alone == 2 * adapter


def test_a_student_that_is_sharded_shares_no_base(teacher_weights):
    """As in training: a forward pass of a teacher cannot run inside the engine's wrapper."""
    together, adapter = teacher_weights("", merge=False)
    apart, _ = teacher_weights("", merge=False, gpus=2)
    assert together == 2 * adapter
    assert apart > 10 * together


def test_a_plan_of_a_model_that_is_only_described_says_what_it_needs(models, monkeypatch, tmp_path):
    described = ModelInfo(name="served", origin="server", layers=2, heads=2, vocabulary=100)
    known = plan.plan_info
    monkeypatch.setattr(
        plan,
        "plan_info",
        lambda recipe, name: described if name == "served" else known(recipe, name),
    )
    stage = {
        "student": str(models / "student"),
        "teacher": "served",
        "data": {"a": 1.0},
        "loss": {"prediction": 1.0},
    }
    path = tmp_path / "recipe.yaml"
    recipe = {"models": {"served": {"path": "served"}}, "stages": {"s": stage}}
    path.write_text(json.dumps({**recipe, "data": {"a": "nowhere.jsonl"}}))
    with pytest.raises(InputError, match="a plan needs to know more of this model") as refused:
        plan_recipe(load_recipe(path), machine(gpu="h100"), conversations=100)
    assert refused.value.where == "served"


@pytest.mark.parametrize(("experts", "chosen"), [(8, 2), (4, 1), (4, 4)])
def test_router_losses_keep_what_is_planned(experts, chosen):
    tokens, layers = 600, 3
    logits = [torch.randn(tokens, experts, requires_grad=True) for _ in range(layers)]
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.dtype == torch.float32 and tensor.numel() >= tokens * experts:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    conversations = Conversations(torch.arange(tokens) // 100, torch.ones(6), torch.ones(6))
    routing = [Routing(each, each.topk(chosen).indices) for each in logits]
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        router_loss(routing, conversations)
    config = MixtralConfig(
        num_hidden_layers=layers, num_local_experts=experts, num_experts_per_tok=chosen
    )
    planned = router_loss_memory(config, tokens)
    assert planned[0] == pytest.approx(sum(kept.values()), rel=0.05)
    assert router_loss_memory(MixtralConfig(num_local_experts=0), tokens) == (0.0, 0.0)


def test_a_router_loss_is_part_of_the_plan(planned, models):
    mixture = f"stages.s.student={models / 'teacher'}"
    terms = "stages.s.loss={{prediction: 1.0{}}}"
    without, with_it = (
        planned(mixture, terms.format(more)).stages["s"].memory for more in ("", ", router: 0.01")
    )
    added = with_it.totals["backward"] - without.totals["backward"]
    assert added == with_it.phases["backward"]["router loss"] == 6 * 8 * 128 * 4 * 2 * 4
