"""Answers a second of a local model: a batch of prompts at once, beside one after another.

The same prompts, the same model, greedy, the same number of new tokens; the sizes of a batch take
turns, so that a busy machine is busy for all, and a ratio is the median of the ratios of the
rounds, of wall time and of the process's CPU time. The model is a small Mistral with random
weights; on a GPU it has the shape of a 1B model, in bfloat16.

    python benchmarks/generation.py [--quick] [--json]

``--quick`` ends within 50 seconds on two cores; a full run also writes a dated table to
``benchmarks/results``.
"""

from __future__ import annotations

import statistics
import time
from typing import TYPE_CHECKING

import _results
import torch
from _results import DEVICE, GPU, Row
from transformers import MistralConfig, MistralForCausalLM

from dominie.generation.generator import GenerationRequest, Sampling, generate_all
from dominie.generation.local import LocalGenerator
from dominie.toyworld.toy_models import word_tokenizer

if TYPE_CHECKING:
    from collections.abc import Iterator

VOCABULARY = 32_000


def random_mistral(width: int, layers: int) -> MistralForCausalLM:
    """Random weights, and no token that ends an answer early."""
    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=VOCABULARY,
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        num_key_value_heads=max(1, width // 256),
        max_position_embeddings=2048,
        eos_token_id=None,
        pad_token_id=0,
    )
    dtype = torch.bfloat16 if GPU else torch.float32
    return MistralForCausalLM(config).eval().to(DEVICE, dtype)


def spent(
    model: MistralForCausalLM, prompts: list[list[int]], new: int, batch: int
) -> tuple[float, float]:
    """(wall, CPU) seconds for all prompts."""
    wall, cpu = time.perf_counter(), time.process_time()
    tokenizer, sampling = word_tokenizer(), Sampling(max_new_tokens=new)
    stops = (VOCABULARY - 1,)
    requests = [
        GenerationRequest(token_ids=prompt, stop_ids=stops, sampling=sampling) for prompt in prompts
    ]
    generate_all(LocalGenerator(lambda: (model, tokenizer), batch=batch), requests)
    return time.perf_counter() - wall, time.process_time() - cpu


def rows(quick: bool) -> Iterator[Row]:
    """One row for each size of a batch."""
    sizes = [1, 4, 16] if quick else [1, 4, 16, 64] if GPU else [1, 4, 16, 32]
    count, new, rounds = (16, 8, 2) if quick else (max(sizes), 32, 3)
    shape = (256, 4) if quick else (2048, 16) if GPU else (512, 8)
    model = random_mistral(*shape)
    random = torch.Generator().manual_seed(1)
    lengths = torch.randint(20, 120, (count,), generator=random).tolist()
    prompts = [
        torch.randint(4, VOCABULARY - 1000, (n,), generator=random).tolist() for n in lengths
    ]
    spent(model, prompts[:2], 2, 2)
    times = [[spent(model, prompts, new, size) for size in sizes] for _ in range(rounds)]
    for i, size in enumerate(sizes):
        wall = statistics.median(row[i][0] for row in times)
        yield {
            "batch": size,
            "prompts": count,
            "new_tokens": new,
            "seconds": round(wall, 2),
            "answers_per_second": round(count / wall, 2),
            "speedup": round(statistics.median(row[0][0] / row[i][0] for row in times), 2),
            "speedup_cpu": round(statistics.median(row[0][1] / row[i][1] for row in times), 2),
        }


def main() -> None:
    """Measure, print, and after a full run write down."""
    options = _results.parser(__doc__).parse_args()
    parts = _results.gathered(rows(options.quick), as_json=options.json)
    note = "`speedup` is against one prompt at a time, round by round; `speedup_cpu` in CPU time."
    _results.finish("generation", "Generation", parts, options, note=note)


if __name__ == "__main__":
    main()
