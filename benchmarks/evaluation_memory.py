"""Memory of an evaluation: the most that the process holds, beside how many models are scored.

Models of equal size answer questions and are compared with a teacher of that size; an evaluation
holds one model and one teacher, so that its memory does not grow with the number of models. Each
row is a process of its own on the CPU, `dominie evaluate`, with the peak of its resident memory.

    python benchmarks/evaluation_memory.py [--quick] [--json]

``--quick`` ends within 50 seconds on two cores; a full run also writes a dated table to
``benchmarks/results``.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import _results
import torch
from transformers import MistralConfig, MistralForCausalLM

from dominie.toyworld.toy_models import word_tokenizer

if TYPE_CHECKING:
    from collections.abc import Iterator

    from _results import Row

#: Runs the command line and prints the peak of resident memory in KiB, as Linux counts it.
_MEASURED = (
    "import resource, subprocess, sys\n"
    "done = subprocess.run([sys.executable, '-m', 'dominie', 'evaluate', *sys.argv[1:]],"
    " stdout=subprocess.DEVNULL)\n"
    "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)\n"
    "sys.exit(done.returncode)"
)


def write_model(folder: Path, seed: int, layers: int) -> int:
    """Write a Mistral with random bfloat16 weights; return its bytes in float32."""
    torch.manual_seed(seed)
    tokenizer = word_tokenizer()
    config = MistralConfig(
        vocab_size=len(tokenizer),
        hidden_size=768,
        intermediate_size=2304,
        num_hidden_layers=layers,
        num_attention_heads=12,
        num_key_value_heads=4,
        max_position_embeddings=128,
        bos_token_id=2,
        eos_token_id=3,
        pad_token_id=0,
    )
    model = MistralForCausalLM(config)
    size = sum(parameter.nbytes for parameter in model.parameters())
    model.bfloat16().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return size


def peak(folder: Path, models: int) -> int:
    """Return the bytes that an evaluation of so many models holds at most."""
    tree = {
        "name": f"of{models}",
        # Converted while loading: else their memory is pages of the files, dropped at any time.
        "models": {
            name: {"path": str(folder / name), "dtype": "fp32"}
            for name in ("t", *(f"m{i}" for i in range(models)))
        },
        "data": {"asked": {"path": "rows.jsonl", "test_fraction": 1.0}},
        "evaluate": {
            "models": {f"m{i}": f"m{i}" for i in range(models)},
            "tasks": {
                "exact": {"source": "asked", "max_new_tokens": 4},
                "near": {"source": "asked", "metric": "agreement", "teacher": "t"},
            },
        },
    }
    recipe = folder / f"of{models}.yaml"
    recipe.write_text(json.dumps(tree))  # which is YAML
    command = [sys.executable, "-c", _MEASURED, str(recipe), "--runs", str(folder / "runs")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    return int(done.stdout) * 1024


def rows(quick: bool) -> Iterator[Row]:
    """One row for each number of models."""
    counts = (1, 2) if quick else (1, 2, 4)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        asked = [
            {"prompt": f"the {colour} lamp ?", "completion": colour} for colour in ("red", "blue")
        ]
        (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in asked))
        sizes = [
            write_model(folder / name, seed, layers=2 if quick else 6)
            for seed, name in enumerate([*(f"m{i}" for i in range(max(counts))), "t"])
        ]
        for count in counts:
            yield {
                "models": count,
                "model_mb": round(sizes[0] / 1e6),
                "peak_mb": round(peak(folder, count) / 1e6),
            }


def main() -> None:
    """Measure, print, and after a full run write down."""
    options = _results.parser(__doc__).parse_args()
    parts = _results.gathered(rows(options.quick), as_json=options.json)
    note = "`peak_mb` is the peak of resident memory of `dominie evaluate`, libraries included."
    _results.finish("evaluation_memory", "Memory of an evaluation", parts, options, note=note)


if __name__ == "__main__":
    main()
