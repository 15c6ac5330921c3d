"""Tiny models for tests: real architectures, a few thousand weights, made from a seed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

SIZES: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,  # or attention is uniform and predictions hardly differ
}

#: What a family needs beside the sizes.
FAMILIES: dict[str, dict[str, Any]] = {
    "mistral": {"sliding_window": None},
    "mixtral": {"sliding_window": None, "num_local_experts": 3},
    "llama": {},
    "qwen2": {},
    "qwen3": {"head_dim": 8},
    "qwen3_moe": {
        "head_dim": 8,
        "moe_intermediate_size": 24,
        "num_experts": 4,
        "num_experts_per_tok": 2,
    },
    "gemma2": {"head_dim": 8},
    "gemma3_text": {"head_dim": 8, "query_pre_attn_scalar": 8},
}


def tiny_config(family: str = "mistral", **changes: Any) -> Any:
    """A configuration of `SIZES`, with changes."""
    return AutoConfig.for_model(family, **{**SIZES, **FAMILIES[family], **changes})


def tiny_model(
    family: str = "mistral", *, seed: int = 0, dtype: torch.dtype = torch.float32, **changes: Any
) -> Any:
    """A causal language model in training mode; float64 where a test compares gradients."""
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(tiny_config(family, **changes)).to(dtype)


def tiny_folder(folder: Path, family: str = "mistral", *, seed: int = 0, **changes: Any) -> Path:
    """A folder with such a model as transformers saves it, without a tokenizer."""
    tiny_model(family, seed=seed, **changes).save_pretrained(folder)
    return folder
