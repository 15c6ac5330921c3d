"""Prepares the real run: the models to start from, their tokenizer, and the data split in two.

    python examples/real_run/prepare.py gsm_8k_train.json

writes `teacher/` (Mixtral architecture) and `student/` (Mistral architecture), both untrained and
with the 32,000-piece tokenizer of Mistral-7B-v0.1, and `general.jsonl` and `money.jsonl`.
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import LlamaTokenizer, PreTrainedModel

FOLDER = Path("runs/real-run.input")

# What speaks of an amount of money is the domain; the general data never do.
_MONEY = re.compile(r"\$|\b(dollars?|cents?)\b", re.IGNORECASE)

# Mistral's instruction format: "[INST] question [/INST] answer</s>".
_CHAT_TEMPLATE = (
    "{{- bos_token -}}"
    "{%- for message in messages -%}"
    "{%- if message['role'] == 'user' -%}{{- '[INST] ' + message['content'] + ' [/INST]' -}}"
    "{%- else -%}{{- ' ' + message['content'] + eos_token -}}{%- endif -%}"
    "{%- endfor -%}"
)

# Layers and heads are the same, so that attention distillation compares them one to one. Tied
# embeddings, because 32,000 rows are most of a model this small; the deviation of initial weights
# is larger than the usual 0.02, which is meant for widths of thousands.
_SHARED = {
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.06,
    "max_position_embeddings": 512,
    "sliding_window": None,
    "tie_word_embeddings": True,
    "dtype": "float32",
}


def main() -> None:
    """Read the command line and write the folder."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path, help="Alpaca-style JSON: instruction, input, output")
    parser.add_argument("folder", type=Path, nargs="?", default=FOLDER, help="default: %(default)s")
    parser.add_argument("--rows", type=int, help="use the first rows only")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    rows = json.loads(options.data.read_text(encoding="utf-8"))[: options.rows]
    for name, members in split_by_money(rows).items():
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in members)
        (options.folder / f"{name}.jsonl").write_text(lines, encoding="utf-8")
        print(f"{name:8} {len(members):,} conversations")
    tokenizer = mistral_tokenizer()
    for name, model in untrained_models(tokenizer).items():
        model.save_pretrained(options.folder / name)
        tokenizer.save_pretrained(options.folder / name)
        print(f"{name:8} {model.num_parameters() / 1e6:.2f}M parameters")


def split_by_money(rows: list[dict[str, str]]) -> dict[str, list[dict[str, str]]]:
    """The rows that name an amount of money in problem or solution, and those that do not."""
    split: dict[str, list[dict[str, str]]] = {"general": [], "money": []}
    for row in rows:
        text = f"{row['instruction']} {row['output']}"
        split["money" if _MONEY.search(text) else "general"].append(row)
    return split


def mistral_tokenizer() -> LlamaTokenizer:
    """The tokenizer of Mistral-7B-v0.1 and Mixtral, from the file that `mistral-common` ships.

    SentencePiece joins the pair of pieces whose joint piece is likeliest, so the merges of the
    fast tokenizer are all such pairs, the likeliest joint piece first.
    """
    import mistral_common
    from sentencepiece import SentencePieceProcessor
    from transformers import LlamaTokenizer

    file = Path(mistral_common.__file__).parent / "data" / "tokenizer.model.v1"
    pieces = SentencePieceProcessor(str(file))
    ids = {pieces.id_to_piece(i): i for i in range(pieces.get_piece_size())}
    merges = []
    for piece, number in ids.items():
        halves = [(piece[:cut], piece[cut:]) for cut in range(1, len(piece))]
        known = [half for half in halves if half[0] in ids and half[1] in ids]
        known.sort(key=lambda half: (ids[half[0]], ids[half[1]]))
        merges += [(-pieces.get_score(number), half) for half in known]
    merges.sort(key=lambda merge: merge[0])
    tokenizer = LlamaTokenizer(vocab=ids, merges=[half for _, half in merges])
    tokenizer.chat_template = _CHAT_TEMPLATE
    return tokenizer


def untrained_models(tokenizer: LlamaTokenizer) -> dict[str, PreTrainedModel]:
    """The teacher, a mixture of four experts, and the smaller dense student; random weights."""
    import torch
    from transformers import (
        MistralConfig,
        MistralForCausalLM,
        MixtralConfig,
        MixtralForCausalLM,
    )

    shared: dict[str, Any] = {
        **_SHARED,
        "vocab_size": len(tokenizer),
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    torch.manual_seed(0)
    experts = {"num_local_experts": 4, "num_experts_per_tok": 2}
    return {
        "teacher": MixtralForCausalLM(
            MixtralConfig(**shared, **experts, hidden_size=128, intermediate_size=256)
        ),
        "student": MistralForCausalLM(
            MistralConfig(**shared, hidden_size=96, intermediate_size=256)
        ),
    }


if __name__ == "__main__":
    main()
