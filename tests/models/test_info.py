"""What is known of a model: read off a configuration, or a description that lacks some of it."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny import tiny_config, tiny_folder, tiny_model
from transformers import AutoConfig

from dominie.core.display import Display
from dominie.core.errors import InputError
from dominie.models.info import ModelInfo, Workload, describe, info_of, model_flops
from dominie.models.spec import Model
from dominie.models.weights import model_identity
from dominie.recipe import load_recipe
from dominie.stages.prepare import Preparation
from dominie.stages.run_folder import RunFolder


def test_a_folder_s_facts_are_those_of_its_configuration(tmp_path):
    spec = Model(path=str(tiny_folder(tmp_path / "m", "mixtral")))
    info = describe(spec)
    assert (info.name, info.origin, info.base, info.adapter) == (
        spec.path,
        "local",
        spec.path,
        None,
    )
    assert (info.family, info.vocabulary, info.context) == ("mixtral", 61, 64)
    assert (info.layers, info.heads, info.key_heads, info.head_size) == (2, 2, 1, 8)
    assert (info.hidden_size, info.experts, info.experts_per_token) == (16, 3, 2)
    assert info.dtype == "fp32"
    assert describe(Model(path=spec.path, dtype="bf16"), name="m").dtype == "bf16"
    assert info.identity() == model_identity(spec)


@pytest.mark.parametrize(
    ("family", "changes", "experts"),
    [
        ("llama", {}, None),
        ("mixtral", {"num_local_experts": 1}, None),
        ("qwen3_moe", {}, 4),
        ("deepseek_v3", {"n_routed_experts": 16}, 16),
    ],
)
def test_experts_by_whatever_name_a_family_has_for_them(family, changes, experts):
    config = AutoConfig.for_model(family, **changes)
    if family in ("llama", "qwen3_moe"):
        config = tiny_config(family)
    assert info_of(config).experts == experts


@pytest.fixture
def prepared(tmp_path: Path):
    """The stages of a recipe whose teacher, `served`, is known by a description alone."""

    def prepare(loss: str, **facts: int):
        class WithAServer(RunFolder):
            def info(self, name: str) -> ModelInfo:
                if name != "served":
                    return super().info(name)
                tokens = super().info("toyworld:student").tokenizer_spec
                return ModelInfo(name=name, origin="server", tokenizer_spec=tokens, **facts)

        (tmp_path / "r.yaml").write_text(
            "data: {general: 'toyworld:general?rows=40'}\n"
            "models: {served: {path: nowhere/at-all}}\n"
            "train: {steps: 1, batch: 2, max_length: 128}\n"
            "stages:\n  s:\n    student: toyworld:student\n    teacher: served\n"
            f"    data: {{general: 1.0}}\n    loss: {{{loss}}}\n"
        )
        return Preparation(WithAServer(load_recipe(tmp_path / "r.yaml"), tmp_path), Display()).all()

    return prepare


def test_a_described_teacher_goes_through_the_checks(prepared):
    (stage,) = prepared("prediction: 1.0", vocabulary=10_000)
    assert set(stage.teachers) == {"served"}
    with pytest.raises(InputError, match=r"(?s)model served: .*below 3 .*in the data"):
        prepared("prediction: 1.0", vocabulary=3)
    with pytest.raises(InputError, match=r"(?s)model served: .*at most 16 tokens"):
        prepared("prediction: 1.0", context=16)


def test_another_description_is_another_teacher(prepared):
    ((one,), (other,)) = (prepared("prediction: 1.0", vocabulary=n) for n in (10_000, 20_000))
    assert one.fingerprint != other.fingerprint


def test_what_needs_an_absent_fact_is_refused_in_one_message(prepared):
    with pytest.raises(InputError) as refused:
        prepared("prediction: 1.0, attention: 1.0")
    error = refused.value
    assert error.where == "stages.s.served"
    assert error.what == "comparing attention needs to know more of this model than is known"
    assert error.expected == "heads"
    assert error.found == "a model behind a server without it"
    assert error.do == "name a folder or a model of the hub with a config.json"


@pytest.mark.parametrize("window", [None, 1, 3, 9, 20])
def test_a_planned_token_costs_the_mean_of_a_conversation_s(window):
    """The planner's FLOPs of a token are those that training counts over a conversation."""
    length = 9
    keys = sum(min(position, window or length) for position in range(1, length + 1))
    flops = model_flops(tiny_model("mistral", sliding_window=window))
    counted = Workload(tokens=length, supervised=length, keys={window: keys})
    planned = Workload.of_a_token(flops.attended, length)
    assert flops.training(planned) * length == pytest.approx(flops.training(counted))
    assert flops.forward(planned) * length == pytest.approx(flops.forward(counted))
