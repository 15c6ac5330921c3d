"""A tiny Llama with a byte-level tokenizer as a GGUF file, written by the package gguf."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from tiny import tiny_model

SPECIAL = ("<|end|>", "<|user|>", "<|assistant|>")
TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "model.layers.": "blk.",
}


def tiny_llama(seed: int = 0) -> Any:
    """The model that the file is of; rows of 32 numbers, which is a block of Q8_0."""
    size = {"hidden_size": 32, "intermediate_size": 64, "max_position_embeddings": 512}
    return tiny_model("llama", seed=seed, vocab_size=len(tokens()), **size).eval()


def tokens() -> list[str]:
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    return [*SPECIAL, *sorted(bytes_to_unicode().values()), "th", "the"]


def tiny_gguf(
    path: Path, *, kind: str = "F32", architecture: str = "llama", seed: int = 0, **metadata: Any
) -> Path:
    """Write the file.

    Args:
        path: of the file.
        kind: what matrices are rounded to, as ggml calls it.
        architecture: that the header names.
        seed: of the weights.
        metadata: further keys, `__` for a dot; texts or whole numbers.
    """
    import gguf

    model, words = tiny_llama(seed), tokens()
    config, writer = model.config, gguf.GGUFWriter(str(path), architecture)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(len(words))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(words)
    writer.add_token_types([3] * len(SPECIAL) + [1] * (len(words) - len(SPECIAL)))
    writer.add_token_merges(["t h", "th e"])
    writer.add_eos_token_id(0)
    writer.add_bos_token_id(0)
    writer.add_pad_token_id(0)
    writer.add_chat_template(TEMPLATE)
    writer.add_string("general.license", "apache-2.0")
    for key, value in metadata.items():
        add = writer.add_string if isinstance(value, str) else writer.add_uint32
        add(key.replace("__", "."), value)
    for name, tensor in model.state_dict().items():
        values = tensor.float().numpy()
        for heads, part in ((config.num_attention_heads, "q"), (config.num_key_value_heads, "k")):
            if f"{part}_proj" in name:
                values = permuted(values, heads)
        for ours, theirs in NAMES.items():
            name = name.replace(ours, theirs)
        rounded = gguf.GGMLQuantizationType[kind if values.ndim > 1 else "F32"]
        writer.add_tensor(name, gguf.quantize(values, rounded), raw_dtype=rounded)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def permuted(weights: np.ndarray, heads: int) -> np.ndarray:
    """Rows as llama.cpp wants them for its rotary embedding: pairs side by side."""
    halves = weights.reshape(heads, 2, weights.shape[0] // heads // 2, weights.shape[1])
    return np.ascontiguousarray(halves.swapaxes(1, 2).reshape(weights.shape))
