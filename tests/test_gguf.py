"""The way to GGUF, with llama.cpp's own converter: set LLAMA_CPP to a checkout of it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.full

HERE = Path(__file__).parent
READ = """
import sys
from gguf import GGUFReader
reader = GGUFReader(sys.argv[1])
fields = {name: field.contents() for name, field in reader.fields.items()}
print(fields["general.architecture"])
print(fields["tokenizer.ggml.eos_token_id"], len(fields["tokenizer.ggml.tokens"]))
print("[INST]" in fields["tokenizer.chat_template"])
embedding = next(t for t in reader.tensors if t.name == "token_embd.weight").data
print(len(reader.tensors), embedding.shape, float(embedding.sum(dtype="float64")))
"""


def test_llama_cpp_converts_a_model_as_a_stage_writes_it(tmp_path):
    if not (home := os.environ.get("LLAMA_CPP")):
        pytest.skip("LLAMA_CPP names no checkout of llama.cpp, whose converter is in no package")
    pytest.importorskip("mistral_common", reason="pip install -e '.[dev]'")
    from transformers import AutoTokenizer, MistralConfig, MistralForCausalLM

    from dominie.models.travel import ready_to_travel

    folder = tmp_path / "model"
    maker = HERE / "data" / "mistral_tokenizer.py"
    subprocess.run([sys.executable, str(maker), str(folder)], check=True)
    config = MistralConfig(
        vocab_size=32000, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=128,
    )  # fmt: skip
    torch.manual_seed(0)
    model = MistralForCausalLM(config)
    model.save_pretrained(folder)
    ready_to_travel(folder, AutoTokenizer.from_pretrained(folder))

    made = tmp_path / "made.gguf"
    environment = {**os.environ, "PYTHONPATH": f"{home}/gguf-py"}
    convert = [sys.executable, f"{home}/convert_hf_to_gguf.py", str(folder)]
    convert += ["--outfile", str(made), "--outtype", "f32"]
    subprocess.run(convert, check=True, env=environment)
    read = [sys.executable, "-c", READ, str(made)]
    said = subprocess.run(read, check=True, env=environment, capture_output=True, text=True)
    family, ends, template, tensors = said.stdout.splitlines()
    assert family in ("llama", "mistral", "mistral3")
    assert ends == "2 32000"
    assert template == "True"
    weights = model.get_input_embeddings().weight.detach().double()
    count, *_, total = tensors.split()
    assert int(count) == len(model.state_dict())
    assert float(total) == pytest.approx(float(weights.sum()), rel=1e-6)
