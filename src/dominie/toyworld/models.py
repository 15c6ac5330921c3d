"""The untrained toy models: a Mixtral teacher and a smaller Mistral student, layer for layer."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dominie.toyworld.tokenizer import word_tokenizer

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import PreTrainedModel

MODELS = ("teacher", "student")

# Layers and heads are equal, so that attention distillation maps them one to one. The rest makes
# copying, on which most skills rest, quick to learn: the usual initial deviation of 0.02 is too
# small at this width, a rotary base of 10,000 too slow to tell places apart in 25 tokens, and with
# tied embeddings an attended word is already the answer.
_SHARED = {
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.06,
    "max_position_embeddings": 256,
    "rope_parameters": {"rope_type": "default", "rope_theta": 100.0},
    "sliding_window": None,
    "tie_word_embeddings": True,
}


def untrained_model(kind: str, seed: int) -> PreTrainedModel:
    """The `teacher` or the `student` with random weights; the global random state is untouched."""
    import torch
    from transformers import (
        MistralConfig,
        MistralForCausalLM,
        MixtralConfig,
        MixtralForCausalLM,
    )

    tokenizer = word_tokenizer()
    common = {
        **_SHARED,
        "vocab_size": len(tokenizer),
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "dtype": "float32",
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if kind == "teacher":
            return MixtralForCausalLM(
                MixtralConfig(
                    **common,
                    hidden_size=96,
                    intermediate_size=128,
                    num_local_experts=4,
                    num_experts_per_tok=2,
                )
            )
        return MistralForCausalLM(MistralConfig(**common, hidden_size=96, intermediate_size=192))


def save_model(kind: str, folder: Path, seed: int) -> None:
    """Write an ordinary Hugging Face folder: weights, configurations, tokenizer, chat template."""
    untrained_model(kind, seed).save_pretrained(folder)
    word_tokenizer().save_pretrained(folder)
