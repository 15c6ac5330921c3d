"""Small tokenizers of every kind, trained on the spot, each with a chat template of its own."""

from __future__ import annotations

import json
from functools import cache
from typing import Any

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

TEXTS = [
    "The quick brown fox jumps over the lazy dog, and the dogs were quickly jumping.",
    "Teachers teach what teaching students learn: 1,234 lessons in 56 hours!",
    "def teach(student):\n    for lesson in lessons:\n        student.learn(lesson)\n",
    "Ünïcödé façade naïve 東京は日本の首都です 👩‍🏫 teaches 🎓.",
    "    indented\t tabs and  double  spaces",
]

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
GEMMA = (
    "<bos>{% for m in messages %}<start>{{ 'model' if m.role == 'assistant' else m.role }}\n"
    "{{ m.content | trim }}<end>\n{% endfor %}"
    "{% if add_generation_prompt %}<start>model\n{% endif %}"
)


@cache
def byte_level(size: int = 400, template: str = CHATML) -> Any:
    """Byte-level BPE, as GPT-2 has it."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    return _trained(tokenizer, trainers.BpeTrainer, size, template, initial_alphabet=alphabet)


@cache
def sentence_piece(size: int = 500, template: str = GEMMA) -> Any:
    """BPE with ▁ for spaces and bytes for what it has no character of, as Gemma has it."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    # Characters that are left out of the alphabet are written in bytes.
    fast = _trained(tokenizer, trainers.BpeTrainer, size, template, limit_alphabet=60)
    state = json.loads(fast.backend_tokenizer.to_str())
    vocabulary = state["model"]["vocab"]
    vocabulary |= {f"<0x{byte:02X}>": len(vocabulary) + byte for byte in range(256)}
    fast.backend_tokenizer.model = Tokenizer.from_str(json.dumps(state)).model
    return fast


@cache
def word_piece(size: int = 260, template: str = GEMMA) -> Any:
    """WordPiece that lowers its text and strips its accents, as BERT has it."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFD(), normalizers.Lowercase(), normalizers.StripAccents()]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    return _trained(tokenizer, trainers.WordPieceTrainer, size, template)


def _trained(tokenizer: Any, trainer: Any, size: int, template: str, **options: Any) -> Any:
    marks = ["<|im_start|>", "<|im_end|>"] if template == CHATML else ["<bos>", "<start>", "<end>"]
    special = [*marks, "<unk>"]
    made = trainer(vocab_size=size, special_tokens=special, show_progress=False, **options)
    tokenizer.train_from_iterator(TEXTS * 3, made)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    fast.add_special_tokens({"additional_special_tokens": special})
    fast.chat_template = template
    return fast
