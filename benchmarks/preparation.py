"""Conversations prepared per second, on one core and on two, beside TRL's way.

Conversations are read from a file, split, rendered with a ChatML template, tokenised by a
byte-level BPE of 4,000 tokens and stored; by dominie with masks that are verified. Beside it stands
what TRL's SFTTrainer does with the same file, by the calls that it makes: `datasets` reads it, and
its `map` calls `apply_chat_template`, without a mask of the answers (the default) and with one,
which takes a template that marks them. All take turns, so that other work on the machine affects
them alike; medians are compared. The time includes the start of processes.

    python benchmarks/preparation.py [--quick] [--json]

``--quick`` prepares fewer conversations; a full run also writes a dated table to
``benchmarks/results``.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import statistics
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

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
MARKED = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] + '<|im_end|>\n' }}{% endgeneration %}{% else %}"
    "{{ m['content'] + '<|im_end|>\n' }}{% endif %}{% endfor %}"
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


@contextlib.contextmanager
def limited_to(count: int) -> Iterator[None]:
    """Within, this process and those that it starts have so many cores."""
    every = os.sched_getaffinity(0)
    os.sched_setaffinity(0, sorted(every)[:count])
    try:
        yield
    finally:
        os.sched_setaffinity(0, every)


def ours(path: Path, made: PreTrainedTokenizerFast, scratch: Path, count: int) -> str:
    """Read, split, checked and masked by dominie; the digest of the rows."""
    del count  # it takes the cores that there are
    sources = {"chats": Source(name="chats", path=str(path), test_fraction=0.05)}
    digest: str = prepare(sources, made, max_length=512, cache=scratch)["chats"].train.digest
    return digest


def mapped(path: Path, made: PreTrainedTokenizerFast, scratch: Path, count: int) -> str:
    """What TRL's SFTTrainer has done: `apply_chat_template` in `datasets`' map, no mask."""
    return _mapped(path, made, scratch, count, TEMPLATE)


def masked(path: Path, made: PreTrainedTokenizerFast, scratch: Path, count: int) -> str:
    """The same with `assistant_only_loss`: a template that marks the answers, and its mask."""
    return _mapped(path, made, scratch, count, MARKED)


def _mapped(
    path: Path, made: PreTrainedTokenizerFast, scratch: Path, count: int, template: str
) -> str:
    import datasets

    with_mask = template == MARKED
    datasets.disable_progress_bars()

    def encoded(row: dict[str, Any]) -> dict[str, Any]:
        return dict(
            made.apply_chat_template(
                row["messages"],
                chat_template=template,
                tokenize=True,
                return_dict=True,
                return_assistant_tokens_mask=with_mask,
            )
        )

    read = datasets.load_dataset(
        "json", data_files=str(path), split="train", cache_dir=str(scratch)
    )
    found = read.map(encoded, num_proc=count if count > 1 else None, remove_columns=["messages"])
    return str(len(found))


WAYS = {"dominie": ours, "TRL's, no mask": mapped, "TRL's, with a mask": masked}


def rows(quick: bool) -> Iterator[Row]:
    """A row for each way and number of cores."""
    count, repeats = (3_000, 1) if quick else (10_000, 2)
    counts = [1, 2] if cores() > 1 else [1]
    seconds: dict[tuple[str, int], list[float]] = {(w, n): [] for w in WAYS for n in counts}
    digests = set()
    with tempfile.TemporaryDirectory() as place:
        path, made = Path(place) / "chats.jsonl", tokenizer()
        write(path, count)
        for repeat in range(repeats):
            for number, (way, on) in enumerate(seconds):
                scratch = Path(place) / f"{repeat}-{number}"
                with limited_to(on):
                    begun = time.perf_counter()
                    found = WAYS[way](path, made, scratch, on)
                    seconds[way, on].append(time.perf_counter() - begun)
                digests |= {found} if way == "dominie" else set()
    assert len(digests) == 1, "the rows depend on the number of processes"
    for (way, on), taken in seconds.items():
        median = statistics.median(taken)
        yield {
            "way": way,
            "cores": on,
            "conversations": count,
            "seconds, median": round(median, 2),
            "conversations/s": round(count / median),
            "times one core": round(statistics.median(seconds[way, 1]) / median, 2),
        }


def main() -> None:
    """Measure, print, and after a full run write down."""
    options = _results.parser(__doc__).parse_args()
    parts = _results.gathered(rows(options.quick), as_json=options.json)
    _results.finish("preparation", "Conversations prepared per second", parts, options)


if __name__ == "__main__":
    main()
