"""The parameters of the paper's models come out, and of what is trained in them."""

from __future__ import annotations

import pytest
from tiny import tiny_config

from dominie.models.spec import Model
from dominie.planning.sizes import load_plan_config, shape_of, shipped_names
from dominie.planning.trace import Pass, traced, with_layers
from dominie.training.settings import Lora

MISTRAL, MIXTRAL = "mistralai/Mistral-7B-v0.1", "mistralai/Mixtral-8x7B-Instruct-v0.1"


# Mistral 7B (arXiv 2310.06825), Mixtral (arXiv 2401.04088: 47B, of which 13B are active), and the
# "2x7B" of about 13B; to the last weight by the shapes of the published checkpoints.
@pytest.mark.parametrize(
    ("name", "parameters", "active"),
    [
        (MISTRAL, 7_241_732_096, 7_241_732_096),
        (MIXTRAL, 46_702_792_704, 12_879_925_248),
        ("flip/2x7B", 12_879_138_816, 12_879_138_816),
    ],
)
def test_the_papers_models_have_their_parameters(name, parameters, active):
    shape = shape_of(load_plan_config(Model(path=name)))
    assert (shape.parameters, shape.active) == (parameters, active)
    assert (shape.layers, shape.heads, shape.key_heads, shape.head_width) == (32, 32, 8, 128)


def test_lora_trains_two_thin_matrices_for_every_linear_layer():
    config = load_plan_config(Model(path=MISTRAL))
    r = 16
    found = traced(config, Pass(1, 8, "bf16", "bf16", trained=True, lora=Lora(r=r)))
    linear = 2 * (4096 + 4096) + 2 * (4096 + 1024) + 3 * (4096 + 14336)
    assert found.trainable == 32 * r * linear
    assert found.gradients == 4 * found.trainable  # adapters are fp32
    assert found.weights == 2 * 7_241_732_096 + 4 * found.trainable


@pytest.mark.parametrize("name", [MISTRAL, "flip/2x7B"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_two_short_models_stand_for_a_deeper_one(name, checkpointing):
    config = with_layers(load_plan_config(Model(path=name)), 7)
    run = Pass(2, 256, "fp32", "bf16", trained=True, checkpointing=checkpointing)
    extended = traced(config, run)
    config.layer_types = ["sliding_attention"] * 6 + ["full_attention"]  # no two alike: all are run
    whole = traced(config, run)
    assert extended.parameters == whole.parameters
    for part in ("weights", "activations", "casts", "forward", "backward"):
        assert getattr(extended, part) == pytest.approx(getattr(whole, part), rel=0.01), part


def test_a_family_without_sdpa_is_planned_too():
    config = tiny_config("gemma2")
    assert traced(config, Pass(1, 8, "fp32", "bf16", trained=True)).backward > 0


def test_every_shipped_configuration_makes_a_model():
    assert {MISTRAL, MIXTRAL, "flip/2x7B"} <= set(shipped_names())
    for name in shipped_names():
        assert shape_of(load_plan_config(Model(path=name))).parameters > 1_000_000
