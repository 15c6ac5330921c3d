"""What vLLM reads of `model/`: an architecture it knows, weights by the names it loads, no code."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
from safetensors import safe_open
from transformers import AutoTokenizer

from dominie.cli import app
from dominie.models.weights import prepare_export

RECIPE = """
name: served
data: {d: {path: "toyworld:general?rows=60"}}
train: {learning_rate: 1e-3, steps: 1, batch: 4, max_length: 64}
stages:
  dense: {student: "toyworld:student", data: {d: 1.0}, loss: {next_token: 1.0}}
  mixture: {student: "toyworld:teacher", data: {d: 1.0}, loss: {next_token: 1.0}}
  pair: {upcycle: {model: dense, experts: 2, experts_per_token: 2}}
  merged:
    student: dense
    data: {d: 1.0}
    loss: {next_token: 1.0}
    train: {lora: {r: 2, alpha: 4}}
"""
#: As in `vllm/model_executor/models/registry.py` and the loaders that it names, which take the
#: weights of a checkpoint by these names; any other is an error there.
_EVERY = r"model\.(embed_tokens|norm)\.weight|lm_head\.weight"
_LAYER = r"model\.layers\.\d+\.((input|post_attention)_layernorm|self_attn\.[qkvo]_proj)\.weight"
SERVED = {
    "MistralForCausalLM": rf"{_EVERY}|{_LAYER}"
    r"|model\.layers\.\d+\.mlp\.(gate|up|down)_proj\.weight",
    "MixtralForCausalLM": rf"{_EVERY}|{_LAYER}"
    r"|model\.layers\.\d+\.block_sparse_moe\.(gate|experts\.\d+\.w[123])\.weight",
}


@pytest.fixture(scope="module")
def stages(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("served")
    (folder / "r.yaml").write_text(RECIPE)
    app(["run", str(folder / "r.yaml"), "--runs", str(folder)], standalone_mode=False)
    return folder / "served"


@pytest.mark.parametrize(
    ("stage", "architecture"),
    [
        ("dense", "MistralForCausalLM"),
        ("merged", "MistralForCausalLM"),
        ("mixture", "MixtralForCausalLM"),
        ("pair", "MixtralForCausalLM"),
    ],
)
def test_vllm_knows_what_a_stage_writes(stages, stage, architecture):
    folder = stages / stage / "model"
    config = json.loads((folder / "config.json").read_text())
    assert config["architectures"] == [architecture]
    assert config["use_cache"] is True
    with safe_open(folder / "model.safetensors", "pt") as weights:
        names = list(weights.keys())
    assert len(names) > 10
    assert [name for name in names if not re.fullmatch(SERVED[architecture], name)] == []


@pytest.mark.parametrize("stage", ["dense", "mixture", "pair", "merged"])
def test_nothing_in_it_is_code(stages, stage):
    folder = stages / stage / "model"
    kinds = {path.suffix for path in folder.iterdir()}
    assert kinds <= {".json", ".safetensors", ".jinja", ".md"}
    for name in ("config.json", "tokenizer_config.json", "generation_config.json"):
        read = json.loads((folder / name).read_text())
        assert "auto_map" not in read
        assert "trust_remote_code" not in read
    tokenizer = json.loads((folder / "tokenizer_config.json").read_text())
    import transformers

    assert hasattr(transformers, tokenizer["tokenizer_class"])
    assert (folder / "chat_template.jinja").read_text().strip()


def test_a_sentencepiece_model_travels_with_its_tokenizer(stages, tmp_path):
    """transformers reads and saves `tokenizer.json` alone; llama.cpp takes its scores from here."""
    base = shutil.copytree(stages / "dense" / "model", tmp_path / "base")
    tokenizer = AutoTokenizer.from_pretrained(base)
    made = shutil.copytree(base, tmp_path / "made")
    prepare_export(made, tokenizer)
    assert not (made / "tokenizer.model").exists()
    (base / "tokenizer.model").write_bytes(b"pieces and their scores")
    prepare_export(made, tokenizer)
    assert (made / "tokenizer.model").read_bytes() == b"pieces and their scores"
    prepare_export(made, AutoTokenizer.from_pretrained(made))  # a later stage goes on from it
