"""The way to GGUF, with llama.cpp's own converter, and there: set LLAMA_CPP to a checkout of it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, MistralConfig, MistralForCausalLM

from dominie.models.weights import prepare_export

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


@pytest.fixture(scope="module")
def home() -> str:
    """A checkout of llama.cpp."""
    if not (place := os.environ.get("LLAMA_CPP")):
        pytest.skip("LLAMA_CPP names no checkout of llama.cpp, whose converter is in no package")
    return place


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> MistralForCausalLM:
    """A small Mistral with the real Mistral tokenizer in a folder as a stage writes it."""
    mistral_common = pytest.importorskip("mistral_common", reason="pip install -e '.[dev]'")
    folder = tmp_path_factory.mktemp("gguf") / "model"
    maker = HERE / "data" / "mistral_tokenizer.py"
    subprocess.run([sys.executable, str(maker), str(folder)], check=True)
    config = MistralConfig(
        vocab_size=32000, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=128,
        initializer_range=0.2,
    )  # fmt: skip
    torch.manual_seed(0)
    model = MistralForCausalLM(config).eval()
    model.save_pretrained(folder)
    pieces = Path(mistral_common.__file__).parent / "data" / "tokenizer.model.v1"
    base = shutil.copytree(folder, folder.parent / "base")
    shutil.copyfile(pieces, base / "tokenizer.model")  # as it lies beside Mistral's weights
    prepare_export(folder, AutoTokenizer.from_pretrained(base))
    model.folder = folder
    return model


@pytest.fixture(scope="module")
def made(home, model) -> Path:
    """The same as one file, by llama.cpp's own converter."""
    file = model.folder.parent / "made.gguf"
    convert = [sys.executable, f"{home}/convert_hf_to_gguf.py", str(model.folder)]
    convert += ["--outfile", str(file), "--outtype", "f32"]
    subprocess.run(convert, check=True, env=with_reader(home))
    return file


def with_reader(home: str) -> dict[str, str]:
    """An environment in which the checkout's reader of GGUF comes first."""
    return {**os.environ, "PYTHONPATH": f"{home}/gguf-py"}


def test_llama_cpp_converts_a_model_as_a_stage_writes_it(home, model, made):
    read = [sys.executable, "-c", READ, str(made)]
    said = subprocess.run(read, check=True, env=with_reader(home), capture_output=True, text=True)
    family, ends, template, tensors = said.stdout.splitlines()
    assert family in ("llama", "mistral", "mistral3")
    assert ends == "2 32000"
    assert template == "True"
    weights = model.get_input_embeddings().weight.detach().double()
    count, *_, total = tensors.split()
    assert int(count) == len(model.state_dict())
    assert float(total) == pytest.approx(float(weights.sum()), rel=1e-6)


def test_llama_cpp_runs_it_as_transformers_does(model, made):
    llama_cpp = pytest.importorskip("llama_cpp", reason="pip install llama-cpp-python: it compiles")
    tokenizer = AutoTokenizer.from_pretrained(model.folder)
    text = "What is a dominie? Größe, 日本 🙂"
    plain = tokenizer(text, add_special_tokens=False)["input_ids"]
    asked = [{"role": "user", "content": text}]
    given = tokenizer.apply_chat_template(
        asked, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    ids = given["input_ids"][0].tolist()
    answer = model.generate(**given, max_new_tokens=12, do_sample=False, eos_token_id=None)
    expected = answer[0, len(ids) :].tolist()
    assert len(set(expected)) > 4, "a model that repeats itself would tell nothing"

    llama = llama_cpp.Llama(str(made), n_ctx=128, n_threads=1, verbose=False)
    assert llama.tokenize(text.encode(), add_bos=False, special=False) == plain
    greedy = llama.generate(ids, temp=0.0, repeat_penalty=1.0)
    assert [token for token, _ in zip(greedy, expected, strict=False)] == expected
