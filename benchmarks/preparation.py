"""Conversations prepared per second, by the number of processes that tokenise.

Conversations are read from a file, split, rendered with a ChatML template, tokenised by a
byte-level BPE of 4,000 tokens and stored. Runs with different numbers of processes alternate, so
that other work on the machine affects all of them alike; medians are compared. The time includes
the start of the processes.

    python benchmarks/preparation.py [--quick] [--json]

``--quick`` prepares fewer conversations; a full run also writes a dated table to
``benchmarks/results``.
"""

from __future__ import annotations

import json
import random
import statistics
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

import _results
from _results import Row

from dominie.core.hardware import cores
from dominie.data.rows import prepare
from dominie.data.sources import Source
from dominie.toyworld.toy_models import WORDS

if TYPE_CHECKING:
    from collections.abc import Iterator

    from transformers import PreTrainedTokenizerFast

TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TURNS = 4


def texts(count: int) -> Iterator[str]:
    """Random words, some 20 tokens each."""
    rng = random.Random(0)
    for _ in range(count):
        yield " ".join(rng.choices(WORDS, k=rng.randint(8, 32)))


def tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer trained on such texts."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    special = ["<|im_start|>", "<|im_end|>"]
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(vocab_size=4000, special_tokens=special, show_progress=False)
    backend.train_from_iterator(texts(2000), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<|im_end|>", chat_template=TEMPLATE
    )


def write(path: Path, count: int) -> None:
    """A file of conversations of four turns."""
    contents = texts(count * TURNS)
    roles = ["user", "assistant"] * (TURNS // 2)
    with path.open("w") as file:
        for _ in range(count):
            messages = [{"role": role, "content": next(contents)} for role in roles]
            file.write(json.dumps({"messages": messages}) + "\n")


def rows(quick: bool) -> Iterator[Row]:
    """A row for each number of processes."""
    count, repeats = (8_000, 1) if quick else (10_000, 3)
    counts = [1] + ([2] if cores() > 1 else []) + ([cores()] if cores() > 2 else [])
    seconds: dict[int, list[float]] = {processes: [] for processes in counts}
    digests = set()
    with tempfile.TemporaryDirectory() as scratch:
        path, made = Path(scratch) / "chats.jsonl", tokenizer()
        write(path, count)
        sources = {"chats": Source(name="chats", path=str(path))}
        for repeat in range(repeats):
            for processes in counts:
                begun = time.perf_counter()
                cache = Path(scratch) / f"{processes}-{repeat}"
                found = prepare(sources, made, max_length=512, cache=cache, processes=processes)
                seconds[processes].append(time.perf_counter() - begun)
                digests.add(found["chats"].train.digest)
    assert len(digests) == 1, "the rows depend on the number of processes"
    one = statistics.median(seconds[1])
    for processes, taken in seconds.items():
        median = statistics.median(taken)
        yield {
            "processes": processes,
            "conversations": count,
            "seconds, median": round(median, 2),
            "seconds, least": round(min(taken), 2),
            "conversations/s": round(count / median),
            "times one process": round(one / median, 2),
        }


def main() -> None:
    """Measure, print, and after a full run write down."""
    options = _results.parser(__doc__).parse_args()
    parts = _results.gathered(rows(options.quick), as_json=options.json)
    _results.finish("preparation", "Conversations prepared per second", parts, options)


if __name__ == "__main__":
    main()
