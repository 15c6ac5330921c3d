"""Answers a second of a local model: a batch of prompts at once, against one after another.

The same prompts, the same model, greedy, the same number of new tokens; the two ways take turns, so
that a busy machine is busy for both. The model is a small Mistral with random weights.

    python benchmarks/generation.py [--quick] [--json]

``--quick`` ends within 50 seconds on two cores; a full run also writes a dated table to
``benchmarks/results``.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import statistics
import time
from pathlib import Path

import torch
from transformers import MistralConfig, MistralForCausalLM

from dominie.evaluation.generation import answers
from dominie.toyworld.tokenizer import word_tokenizer

RESULTS = Path(__file__).parent / "results"


def small_model(width: int, layers: int) -> MistralForCausalLM:
    """Random weights, and no token that ends an answer early."""
    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=32_000,
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        num_key_value_heads=max(1, width // 256),
        max_position_embeddings=2048,
        eos_token_id=None,
        pad_token_id=0,
    )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    return MistralForCausalLM(config).eval().to(device, dtype)


def seconds(model: MistralForCausalLM, prompts: list[list[int]], new: int, batch: int) -> float:
    """How long all prompts take."""
    began = time.perf_counter()
    done = answers(
        model, word_tokenizer(), prompts, end_of_turn=[31_999], max_new_tokens=new, batch=batch
    )
    assert sum(1 for _ in done) == len(prompts)
    return time.perf_counter() - began


def measured(quick: bool) -> list[dict[str, float | int]]:
    """One row for each size of a batch."""
    count, new, rounds = (16, 16, 2) if quick else (32, 64, 5)
    model = small_model(256, 4) if quick else small_model(512, 8)
    random = torch.Generator().manual_seed(1)
    lengths = torch.randint(20, 120, (count,), generator=random).tolist()
    prompts = [torch.randint(4, 31_000, (n,), generator=random).tolist() for n in lengths]
    sizes = [1, 4, 16] if quick else [1, 4, 16, 32]
    seconds(model, prompts[:2], 2, 2)
    times = [[seconds(model, prompts, new, size) for size in sizes] for _ in range(rounds)]
    return [
        {
            "batch": size,
            "prompts": count,
            "new_tokens": new,
            "seconds": round(statistics.median(row[i] for row in times), 3),
            "answers_per_second": round(count / statistics.median(row[i] for row in times), 2),
            "speedup": round(statistics.median(row[0] / row[i] for row in times), 2),
        }
        for i, size in enumerate(sizes)
    ]


def main() -> None:
    """Measure, print, and after a full run write down."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    rows = measured(options.quick)
    header = f"{'batch':>5}  {'seconds':>8}  {'answers/s':>9}  {'against one at a time':>21}"
    table = [
        f"{row['batch']:>5}  {row['seconds']:>8.2f}  {row['answers_per_second']:>9.2f}"
        f"  {row['speedup']:>20.2f}×"
        for row in rows
    ]
    print("\n".join(map(json.dumps, rows) if options.json else [header, *table]))
    if not options.quick:
        today = datetime.date.today().isoformat()
        device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine()
        text = (
            f"# Generation, {today}\n\n`python benchmarks/generation.py`, {device}, "
            f"{torch.get_num_threads()} threads, torch {torch.__version__}; medians of rounds that "
            "take turns.\n\n```\n" + "\n".join([header, *table]) + "\n```\n"
        )
        (RESULTS / f"generation-{today}.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
