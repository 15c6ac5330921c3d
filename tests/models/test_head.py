"""The head read off a configuration, against the logits of the model itself."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    Gemma2Config,
    GraniteConfig,
    MistralConfig,
)

from dominie.core.errors import InputError
from dominie.losses import Head, vocabulary_losses
from dominie.models.head import causal_lm, check_head, decoder, output_head

SIZES = {
    "vocab_size": 53,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "initializer_range": 0.5,
    "pad_token_id": 0,
}
FAMILIES = {
    "gemma2": Gemma2Config(**SIZES, head_dim=8, final_logit_softcapping=2.0),
    "cohere": CohereConfig(**SIZES, logit_scale=0.25),
    "granite": GraniteConfig(**SIZES, logits_scaling=4.0),
    "mistral": MistralConfig(**SIZES),
    "mistral, tied": MistralConfig(**SIZES, tie_word_embeddings=True),
}


def model_of(family: str) -> Any:
    torch.manual_seed(3)
    return AutoModelForCausalLM.from_config(FAMILIES[family]).double().eval()


def ids() -> torch.Tensor:
    return torch.randint(0, 53, (2, 7), generator=torch.Generator().manual_seed(4))


def logits_of(head: Head, hidden: torch.Tensor) -> torch.Tensor:
    logits = head.scale * (hidden @ head.weight.T + (0 if head.bias is None else head.bias))
    return logits if head.softcap is None else head.softcap * torch.tanh(logits / head.softcap)


@pytest.mark.parametrize("family", FAMILIES)
def test_hidden_states_under_the_head_are_the_model_s_logits(family):
    model = model_of(family)
    hidden = decoder(model)(input_ids=ids()).last_hidden_state
    expected = model(input_ids=ids()).logits
    torch.testing.assert_close(logits_of(output_head(model), hidden), expected)
    check_head(model, where=family)


def test_each_family_has_its_own_head():
    heads = {family: output_head(model_of(family)) for family in FAMILIES}
    assert heads["gemma2"].softcap == 2.0
    assert heads["cohere"].scale == 0.25
    assert heads["granite"].scale == 0.25
    assert heads["mistral"].scale == 1.0
    tied = model_of("mistral, tied")
    assert output_head(tied).weight is tied.get_input_embeddings().weight


def adapted(**options: Any) -> Any:
    torch.manual_seed(5)
    config = LoraConfig(r=2, lora_alpha=4, task_type="CAUSAL_LM", **options)
    model = get_peft_model(model_of("granite"), config).double().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:  # begins as zero, which would hide it
                parameter.normal_()
    return model


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["lm_head", "q_proj"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
        {"target_modules": ["q_proj"]},
    ],
)
def test_adapters_belong_to_the_head(options):
    model = adapted(**options)
    hidden = decoder(model)(input_ids=ids()).last_hidden_state
    expected = model(input_ids=ids()).logits
    torch.testing.assert_close(logits_of(output_head(model), hidden), expected)
    check_head(model, where="adapted")


def test_gradients_reach_an_adapter_on_the_head():
    model = adapted(target_modules=["lm_head", "q_proj"])
    tokens = ids()
    labels = tokens.roll(-1, dims=1)

    def gradients(loss: torch.Tensor) -> dict[str, torch.Tensor]:
        model.zero_grad()
        loss.backward()
        named = model.named_parameters()
        return {name: p.grad.clone() for name, p in named if p.grad is not None}

    hidden = decoder(model)(input_ids=tokens).last_hidden_state
    losses = vocabulary_losses(hidden.flatten(0, 1), output_head(model), labels=labels.flatten())
    ours = gradients(losses.next_token)
    logits = model(input_ids=tokens).logits
    loss = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), labels.flatten(), reduction="sum"
    )
    theirs = gradients(loss)
    assert ours.keys() == theirs.keys()
    assert {n.split(".")[-3] for n in ours if "lm_head" in n} == {"lora_A", "lora_B"}
    for name, gradient in theirs.items():
        assert gradient.abs().max() > 0
        torch.testing.assert_close(ours[name], gradient, rtol=1e-6, atol=1e-8)


def test_a_head_that_does_something_else_is_refused():
    model = model_of("mistral")
    plain = model.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        output = plain(*args, **kwargs)
        output.logits = output.logits * 1.5
        return output

    model.forward = forward
    with pytest.raises(InputError, match="its configuration does not say"):
        check_head(model, where="there")


def test_weights_that_are_not_finite_are_refused():
    model = model_of("mistral")
    model.get_input_embeddings().weight.data[1] = float("nan")
    with pytest.raises(InputError, match="logits are not finite"):
        check_head(model, where="there")


def test_checking_leaves_the_mode_as_it_was():
    model = model_of("mistral").train()
    check_head(model, where="there")
    assert model.training
    assert causal_lm(model) is model
