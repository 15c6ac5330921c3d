"""A teacher that is shared out over two processes says what it says whole."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import MistralConfig, MistralForCausalLM, MixtralConfig, MixtralForCausalLM

WORKER = Path(__file__).parent / "sharded_worker.py"
SIZES = {
    "vocab_size": 50,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.3,
    "sliding_window": None,
}


@pytest.mark.timeout(280)
def test_sharded_teachers_say_the_same_though_ranks_ask_different_ones(run_ranks, tmp_path):
    """Attention captured, heads whole, and no rank waits for one that has no row of a teacher."""
    torch.manual_seed(0)
    mixture = MixtralForCausalLM(MixtralConfig(**SIZES, num_local_experts=3))
    dense = MistralForCausalLM(MistralConfig(**SIZES))
    for name, model in (("mixture", mixture), ("dense", dense)):
        model.save_pretrained(tmp_path / name)
    run_ranks(WORKER, tmp_path / "mixture", tmp_path / "dense")
