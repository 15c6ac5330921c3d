"""One capture for every architecture: tiny random models against their own eager maps."""

from __future__ import annotations

import inspect

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from dominie.core.errors import InputError
from dominie.models.attention_capture import AttentionTarget, StudentAttention, TeacherAttention

LAYERS = [0, 1, 2, 3]
DENSE = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
EXPERTS = {
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "n_shared_experts": 1,
}
LATENT = {"kv_lora_rank": 16, "q_lora_rank": 16, "qk_rope_head_dim": 8, "num_key_value_heads": 4}

SUPPORTED = {
    "apertus": {},
    "bitnet": {},
    "cohere": {},
    "cohere2": {"sliding_window": 5},
    "deepseek_v3": LATENT | {"qk_nope_head_dim": 16, "v_head_dim": 12},
    "ernie4_5": {},
    "exaone4": {"sliding_window": 5, "sliding_window_pattern": 2},
    "falcon_h1": {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8},
    "gemma": {},
    "gemma3_text": {"sliding_window": 5, "sliding_window_pattern": 2},
    "glm4": {},
    "glm4_moe": {},
    "gpt2": {"n_embd": 32, "n_head": 4, "n_layer": 4, "n_positions": 64},
    "gpt_neox": {},
    "granite": {"attention_multiplier": 0.2},
    "granitemoe": {"attention_multiplier": 0.2},
    "llama": {},
    "minimax_m2": {},
    "ministral": {"sliding_window": 5},
    "mistral": {"sliding_window": 5},
    "mixtral": {},
    "olmo2": {},
    "olmo3": {"sliding_window": 5},
    "olmoe": {},
    "phi3": {"sliding_window": 5},
    "qwen2": {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 2},
    "qwen2_moe": {"shared_expert_intermediate_size": 16},
    "qwen3": {},
    "qwen3_moe": {},
    "seed_oss": {},
    "smollm3": {},
    "stablelm": {},
    "starcoder2": {"sliding_window": 5},
}
REFUSED = {
    "gemma2": ({}, "soft-capped"),
    "gpt_oss": ({}, "sinks"),
    "qwen3_next": ({}, "linear attention"),
    "minimax": ({"block_size": 4}, "linear attention"),
    "jamba": ({}, "linear attention"),
    "mamba": ({}, "linear attention"),
    "llama4_text": ({}, "chunked attention"),
    "falcon": ({}, "does not go through transformers' AttentionInterface"),
    "doge": ({}, "masks are learned"),
}


def model_of(family: str, options: dict, seed: int) -> nn.Module:
    blank = AutoConfig.for_model(family)
    known = {*blank.to_dict(), *inspect.signature(type(blank).__init__).parameters}
    shared = {name: value for name, value in (DENSE | EXPERTS).items() if name in known}
    config = AutoConfig.for_model(family, **(shared | options))
    generator = torch.Generator().manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, experts_implementation="eager").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() >= 2:
                parameter.normal_(0, 0.3, generator=generator)
    return model


def maps(model: nn.Module, ids: Tensor) -> list[Tensor]:
    model.set_attn_implementation("eager")
    attentions = model(input_ids=ids, output_attentions=True, use_cache=False).attentions
    return [attention.double() for attention in attentions]


@pytest.mark.parametrize("family", SUPPORTED)
def test_loss_and_gradients_are_those_of_maps(family) -> None:
    student = model_of(family, SUPPORTED[family], seed=0)
    teacher = model_of(family, SUPPORTED[family], seed=1).requires_grad_(False)
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(3, 64, (2, 11), generator=generator)
    weights = torch.rand(2, 11, generator=generator)

    kept = TeacherAttention(teacher, LAYERS)
    scored = StudentAttention(student, [(layer, layer) for layer in LAYERS])
    teacher(input_ids=ids, use_cache=False)
    target = AttentionTarget(torch.arange(2), weights, kept.take())
    scored.expect([target], segment_ids=None, value=True)
    student(input_ids=ids, use_cache=False)
    found = scored.take()
    found.backward()
    gradients = {n: p.grad.clone() for n, p in student.named_parameters() if p.grad is not None}
    scored.detach()
    kept.detach()

    expected = torch.zeros((), dtype=torch.float64)
    for a, b in zip(maps(student, ids), maps(teacher, ids), strict=True):
        a, b = a.clamp_min(1e-30), b.clamp_min(1e-30)
        rows = (b * (b.log() - a.log())).sum(-1).mean(1)  # the mean over heads
        expected = expected + (rows * weights).sum() / len(LAYERS)
    assert expected > 0.01
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=0)
    student.zero_grad()
    expected.backward()
    assert gradients
    size = max(float(gradient.abs().max()) for gradient in gradients.values())
    for name, parameter in student.named_parameters():
        gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        found_gradient = gradients.get(name, torch.zeros_like(parameter))
        assert (found_gradient - gradient).abs().max() <= 2e-5 * size, name


@pytest.mark.parametrize("family", REFUSED)
def test_attention_that_is_no_plain_softmax_is_refused_by_name(family) -> None:
    options, reason = REFUSED[family]
    model = model_of(family, options, seed=0)
    implementation = model.config._attn_implementation
    for attach in (TeacherAttention, lambda m, n: StudentAttention(m, [(k, k) for k in n])):
        with pytest.raises(InputError, match=reason) as refusal:
            attach(model, LAYERS)
        assert "set attention: 0" in refusal.value.do
    assert model.config._attn_implementation == implementation


def test_layers_of_plain_softmax_in_a_mixed_model_can_be_mapped() -> None:
    model = model_of("qwen3_next", {}, seed=0)
    kept = TeacherAttention(model, [3])
    with torch.no_grad():
        model(input_ids=torch.randint(3, 64, (2, 11)), use_cache=False)
    assert kept.take()[3].query.shape == (2, 4, 11, 8)


def test_a_layer_that_does_not_exist_is_an_input_error() -> None:
    with pytest.raises(InputError, match="no attention layer 4"):
        TeacherAttention(model_of("llama", {}, seed=0), [0, 4])


def test_flash_attention_gets_one_head_size(monkeypatch) -> None:
    seen = []

    def flash(module, query, key, value, attention_mask, **kwargs):
        seen.append(value.shape[-1])
        return ALL_ATTENTION_FUNCTIONS["sdpa"](module, query, key, value, None, **kwargs)

    model = model_of("deepseek_v3", SUPPORTED["deepseek_v3"], seed=0)
    ids = torch.randint(3, 64, (2, 11))
    with torch.no_grad():
        expected = model(input_ids=ids, use_cache=False).logits
        monkeypatch.setitem(
            type(ALL_ATTENTION_FUNCTIONS)._global_mapping, "flash_attention_2", flash
        )
        model.config._attn_implementation = "flash_attention_2"
        kept = TeacherAttention(model, LAYERS)
        found = model(input_ids=ids, use_cache=False).logits
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)  # two kernels in fp32
    assert seen == [24, 24, 24, 24]
    assert kept.take()[0].query.shape == (2, 4, 11, 24)
    kept.detach()
    assert model.config._attn_implementation == "flash_attention_2"
