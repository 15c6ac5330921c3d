"""What a stage does otherwise than expected is said while it is prepared: by check, and by run."""

from __future__ import annotations

import json
from io import StringIO

import pytest
import torch
from rich.console import Console

from dominie.core.display import Display
from dominie.recipe import load_recipe
from dominie.stages.prepare import Preparation
from dominie.stages.run_folder import RunFolder
from dominie.toyworld.toy_models import save_model

HELD = "what the student starts as"
BF16, UNTIED = "bf16 on a CPU is mostly slower", "one weight for its head and its embedding"


@pytest.fixture
def said(tmp_path):
    turns = [{"role": "user", "content": "copy"}, {"role": "assistant", "content": "red"}]
    (tmp_path / "d.jsonl").write_text(json.dumps({"messages": turns}) + "\n")
    save_model("student", tmp_path / "m", seed=0)  # whose head is tied
    (tmp_path / "r.yaml").write_text(
        "data: {d: {path: d.jsonl}}\n"
        "train: {steps: 2, batch: 4, max_length: 64}\n"
        "stages:\n"
        "  a: {student: m, data: {d: 1.0}, loss: {next_token: 1.0}}\n"
        "  b: {student: a, data: {d: 1.0}, loss: {next_token: 1.0}}\n"
    )

    def prepared(*overrides: str) -> str:
        told = StringIO()
        folder = RunFolder(load_recipe(tmp_path / "r.yaml", overrides), tmp_path / "runs")
        Preparation(folder, Display(Console(file=told, width=400))).all()
        return told.getvalue()

    return prepared


@pytest.mark.skipif(torch.accelerator.is_available(), reason="bf16 is right on an accelerator")
def test_bf16_on_a_cpu_is_said_to_be_slow(said):
    assert BF16 not in said()
    assert said("stages.a.train.precision=bf16").count(BF16) == 1


def test_a_cache_that_is_to_hold_the_student_where_it_starts_is_named(said):
    """Live, the loss of a student against itself has no gradient; from a cache it has."""
    learns = "stages.b.loss={prediction: 1.0}"
    cached = [learns, "stages.b.cache=true"]
    assert HELD in said("stages.b.teacher=a", *cached)
    assert HELD not in said("stages.b.teacher=a", learns)
    assert HELD not in said("stages.b.teacher=m", *cached)
    assert HELD not in said(
        "stages.b.teacher=a", "stages.b.data.d={share: 1.0, cache: false}", *cached[:1]
    )


@pytest.mark.parametrize(
    ("lora", "untied"),
    [
        ("{r: 2}", False),
        ("{r: 2, modules_to_save: [lm_head]}", True),
        ("{r: 2, modules_to_save: [lm_head], merge: false}", True),
        ("{r: 2, target_modules: '.*embed_tokens'}", True),
        ("{r: 2, target_modules: [q_proj]}", False),
    ],
)
def test_a_head_that_will_be_untied_is_named_once(said, lora, untied):
    """The second stage begins from a model that has both already."""
    told = said(f"stages.a.train.lora={lora}", f"stages.b.train.lora={lora}")
    assert told.count(UNTIED) == untied
    assert ("\na: " in told) is untied
