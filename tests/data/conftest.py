import copy
import importlib.util
import json
from pathlib import Path

import pytest
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    trainers,
)
from transformers import PreTrainedTokenizerFast

HERE = Path(__file__).parent
CORPUS = [
    "What is two plus two? The answer is four.",
    "user assistant system tool model\n\n",
    "Größe 你好 привет 🙂 😀 café naïve",
    '{"name": "stock", "arguments": {"id": 7}}',
] * 3


def template(name):
    return (HERE / "chat_templates" / f"{name}.jinja").read_text()


# Letters with what stands before them, digits by threes, signs with the line ends that follow.
WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def byte_level(special, bos=None, eos=None):
    """A byte-level BPE tokenizer that cuts words as those of Llama 3 and Qwen do."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORDS), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=alphabet, special_tokens=special, show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=bos, eos_token=eos)


def byte_fallback():
    """A SentencePiece-like BPE tokenizer that falls back to bytes, as Gemma has it."""
    special = ["<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>"]
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    trainer = trainers.BpeTrainer(
        vocab_size=460,
        limit_alphabet=40,
        special_tokens=[*special, *(f"<0x{byte:02X}>" for byte in range(256))],
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    # The trainer makes the byte pieces added tokens, which they are not: build it again.
    parts = json.loads(tokenizer.to_str())
    parts["added_tokens"] = [t for t in parts["added_tokens"] if t["content"] in special]
    tokenizer = Tokenizer.from_str(json.dumps(parts))
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<eos>", unk_token="<unk>"
    )


@pytest.fixture(scope="session")
def mistral_tokenizer():
    pytest.importorskip("mistral_common", reason="the real Mistral tokenizer is in mistral-common")
    pytest.importorskip("sentencepiece", reason="reads the Mistral tokenizer")
    spec = importlib.util.spec_from_file_location(
        "mistral_tokenizer", HERE / "mistral_tokenizer.py"
    )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.mistral_tokenizer()


@pytest.fixture(scope="session")
def make_tokenizer(request):
    """family -> its tokenizer, with the chat template of the same name."""
    made = {}

    def make(family):
        if family not in made:
            made[family] = _tokenizer(family, request)
        made[family].chat_template = template(family)
        return made[family]

    return make


def _tokenizer(family, request):
    if family in ("mistral", "zephyr"):
        return copy.deepcopy(request.getfixturevalue("mistral_tokenizer"))
    if family == "gemma":
        return byte_fallback()
    if family == "llama3":
        special = ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
        return byte_level(special, bos="<|begin_of_text|>", eos="<|eot_id|>")
    if family == "r1":
        special = ["<|begin|>", "<|end|>", "<|User|>", "<|Assistant|>"]
        return byte_level(special, bos="<|begin|>", eos="<|end|>")
    if family == "harmony":
        return byte_level(["<|start|>", "<|message|>", "<|end|>", "<|return|>"], eos="<|return|>")
    if family == "phi":
        special = ["<|endoftext|>", "<|end|>", "<|user|>", "<|assistant|>", "<|system|>"]
        return byte_level(special, eos="<|endoftext|>")
    if family == "mistral_tools":
        special = ["<s>", "</s>", "[INST]", "[/INST]", "[TOOL_CALLS]", "[TOOL_RESULTS]"]
        return byte_level(special, bos="<s>", eos="</s>")
    tokenizer = byte_level(["<|endoftext|>", "<|im_start|>", "<|im_end|>"], eos="<|im_end|>")
    if family == "qwen3":
        words = ("<think>", "</think>", "<tool_call>", "</tool_call>")
        tokenizer.add_tokens([AddedToken(word, special=False, normalized=False) for word in words])
    return tokenizer
