"""Tiny models that can only give verdicts: which one depends on what they read."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import PhiConfig, PhiForCausalLM, set_seed

from dominie.toyworld.toy_models import END, word_tokenizer

RATINGS = [f"[[{number}]]" for number in range(1, 11)]
LETTERS = ["[[A]]", "[[B]]", "[[C]]"]


def save_tiny_judge(folder: Path, words: list[str]) -> None:
    """Random weights, but every word other than a verdict is out of reach, and a verdict ends."""
    tokenizer = word_tokenizer()
    tokenizer.add_tokens(words)
    tokenizer.model_max_length = 8192
    set_seed(0)
    config = PhiConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=8192,
        initializer_range=0.5,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = PhiForCausalLM(config).eval()
    verdicts = tokenizer.convert_tokens_to_ids(words)
    end = tokenizer.convert_tokens_to_ids(END)
    with torch.no_grad():
        # A verdict's embedding outweighs all that layers add, in a direction only the end looks at.
        embeddings, head = model.get_input_embeddings().weight, model.lm_head
        embeddings[:, 0] = 0.0
        embeddings[verdicts, 0] = 1e4
        head.bias.fill_(-1e4)
        head.bias[verdicts] = 0.0
        head.weight[verdicts, 0] = 0.0
        head.weight[end] = 0.0
        head.weight[end, 0] = 1e4
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
