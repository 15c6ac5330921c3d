"""The teacher cache: bytes, fidelity, what students make of it, and what it costs in time.

    python benchmarks/cache.py [--quick] [--json] [--data gsm8k_train.json] [--work DIR]

Four questions. What is left of a distribution in so many bytes (`fidelity`)? How close to its
teacher does a student get that was trained from them, beside students of the whole distribution, of
the other schemes at the same size and of DistillKit's two published settings (`students`)? What
does writing cost beside the bare forward pass (`writing`), and a training step from the cache
beside a next-token step (`step`)?

The first two need text: Alpaca-style rows, and mistral-common for the 32,000-piece tokenizer;
without `--data` they are skipped. Models and students are kept in `--work`, a row at a time: with
`--minutes` a call ends after about so many, and the next one goes on.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import _cache_students as students
import _results
import numpy as np
import torch

from dominie.data.batch import collate
from dominie.data.shards import Shards, ShardWriter
from dominie.losses import vocabulary_losses
from dominie.models.head import decoder, output_head
from dominie.teachers.cache import Cache, Identity, create
from dominie.teachers.cache_sampling import CacheSettings
from dominie.teachers.cache_writer import entries, measure_token_stats, tiles_of_logits
from dominie.teachers.cached import CachedTeacher
from dominie.teachers.teacher import LocalTeacher

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

VOCABULARY = 32000

NOTE = """Students: held-out KL(teacher ‖ student) in nats a token, and how often both hold the same
token likeliest. Every student goes on from the same weights; it is paired by seed, which draws rows
and order, with the one of the full distribution: `kl_excess_percent` is the mean of the relative
differences, its interval Student's t at 95 %. `bytes` is what was written a supervised token, all
overhead included. Fidelity: of held-out distributions, see `dominie.teachers.cache_writer`. Times:
random weights, jobs take turns, ratios are medians over the rounds."""


class Row:
    """A conversation of random ids, its later part supervised."""

    def __init__(self, generator: np.random.Generator, length: int, prompt: int) -> None:
        self.input_ids = generator.integers(3, VOCABULARY, length).astype(np.int32)
        self.supervised = np.arange(length) >= prompt


def random_rows(count: int, length: int, prompt: int) -> list[Row]:
    generator = np.random.default_rng(0)
    return [Row(generator, length, prompt) for _ in range(count)]


def random_model(width: int, layers: int) -> Any:
    """Random weights; the head's are scaled so that predictions are about as sure as text's."""
    from transformers import MistralConfig, MistralForCausalLM

    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=VOCABULARY,
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        num_key_value_heads=width // 64,
        sliding_window=None,
    )
    model = MistralForCausalLM(config).eval()
    with torch.no_grad():
        model.lm_head.weight.normal_(0, 3.2 / width**0.5)
    return model


def take_turns(rounds: int, *jobs: Callable[[], object]) -> list[list[float]]:
    """Seconds of each job in each round, after one that warms up."""
    times: list[list[float]] = [[] for _ in jobs]
    for turn in range(rounds + 1):
        for job, taken in zip(jobs, times, strict=True):
            gc.collect()
            start = time.perf_counter()
            job()
            if turn:
                taken.append(time.perf_counter() - start)
    return times


def writing(width: int, layers: int, *, count: int, rounds: int, prompt: int) -> dict[str, Any]:
    """Rows of a cache beside the forward pass alone: decoder, and the head where supervised."""
    model, rows, settings = (
        random_model(width, layers),
        random_rows(count, 256, prompt),
        CacheSettings(),
    )
    vocabulary = measure_token_stats(model, rows[:1], VOCABULARY, settings, temperature=1.0)
    batch = collate([(0, row) for row in rows])
    written: list[Any] = []

    @torch.no_grad()
    def bare() -> None:
        for _ in tiles_of_logits(model, batch, VOCABULARY, 1.0):
            pass

    def whole() -> None:
        with tempfile.TemporaryDirectory() as folder, ShardWriter(Path(folder)) as writer:
            written[:] = entries(model, rows, vocabulary, settings, temperature=1.0)
            writer.add(written)

    alone, full = take_turns(rounds, bare, whole)
    tokens = sum(entry.tokens for entry in written)
    body = sum(p.numel() for p in model.model.layers.parameters()) + model.lm_head.weight.numel()
    return {
        "part": "Writing",
        "active_parameters_millions": round(body / 1e6, 1),
        "tokens": 256 * count,
        "supervised_tokens": tokens,
        "bytes_per_token": round(sum(len(entry.code) for entry in written) / tokens, 1),
        "bare_forward_seconds": round(statistics.median(alone), 3),
        "writing_seconds": round(statistics.median(full), 3),
        "speed_of_bare_forward": round(
            statistics.median(a / b for a, b in zip(alone, full, strict=True)), 3
        ),
        "rounds": rounds,
    }


def step(width: int, layers: int, *, count: int, rounds: int, prompt: int) -> dict[str, Any]:
    """Forward and backward of a student: on the next token, from the cache, from a live teacher."""
    rows, settings = random_rows(count, 256, prompt), CacheSettings()
    teacher, student = random_model(128, 2), random_model(width, layers).train()
    twin = random_model(width, layers)
    batch = collate([(0, row) for row in rows])
    labels = batch.labels[batch.supervised]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        identity = Identity(
            teacher="random",
            revision=None,
            weights="",
            tokenizer="",
            vocabulary=VOCABULARY,
            temperature=1.0,
            scheme=settings.identity,
        )
        create(
            folder,
            identity,
            measure_token_stats(teacher, rows[:2], VOCABULARY, settings, temperature=1.0),
            {},
        )
        cache = Cache(folder, identity, remedy="")
        with ShardWriter(folder, owner=cache.owner) as writer:
            writer.add(
                entries(
                    teacher, rows, cache.vocabulary, settings, temperature=1.0, owner=cache.owner
                )
            )
        cached, live = CachedTeacher(cache), LocalTeacher(twin)

        def learn(speaker: Any) -> None:
            student.zero_grad()
            target = None if speaker is None else speaker.signal(batch).parts[0].target
            hidden = decoder(student)(**batch.model_inputs()).last_hidden_state[batch.supervised]
            loss = vocabulary_losses(
                hidden,
                output_head(student),
                target,
                labels=labels if target is None else None,
                metrics=False,
                check_finite=False,
            )
            loss.total.backward()

        jobs = [lambda s=s: learn(s) for s in (None, cached, live)]
        plain, from_cache, from_live = take_turns(rounds, *jobs)
        reading = take_turns(rounds, lambda: cached.signal(batch))[0]
    return {
        "part": "A training step",
        "student_parameters_millions": round(sum(p.numel() for p in student.parameters()) / 1e6, 1),
        "supervised_tokens": len(labels),
        "next_token_seconds": round(statistics.median(plain), 3),
        "cached_seconds": round(statistics.median(from_cache), 3),
        "live_seconds": round(statistics.median(from_live), 3),
        "reading_seconds": round(statistics.median(reading), 4),
        "cached_over_next_token": round(
            statistics.median(c / p for c, p in zip(from_cache, plain, strict=True)), 3
        ),
        "live_over_next_token": round(
            statistics.median(c / p for c, p in zip(from_live, plain, strict=True)), 3
        ),
        "rounds": rounds,
    }


def opening(megabytes: int) -> dict[str, Any]:
    """How long the check of every byte takes when a cache is opened."""
    from dominie.data.shards import Entry

    generator = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as name:
        with ShardWriter(Path(name), shard_bytes=2**26) as writer:
            for _ in range(megabytes):
                codes = [generator.bytes(10_000) for _ in range(100)]
                writer.add([Entry(generator.bytes(16), 160, code) for code in codes])
        (taken,) = take_turns(3, lambda: Shards(Path(name), remedy=""))
    seconds = statistics.median(taken)
    return {
        "part": "Opening a cache",
        "megabytes": megabytes,
        "rows": megabytes * 100,
        "seconds": round(seconds, 3),
        "megabytes_per_second": round(megabytes / seconds),
    }


def texts(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """The parts that need text: students, one by one and summed up, and fidelity."""
    if options.data is None or options.quick:
        reason = "a full run trains them" if options.quick else "no --data"
        yield {"part": "Students", "skipped": reason}
        return
    started = time.monotonic()
    world = students.made(options.data, options.work, teacher_steps=250, student_steps=150)
    rows = []
    for row in students.rows_of_students(
        world,
        options.work / "students.jsonl",
        budget=options.bytes,
        seeds=students.SEEDS,
        rows=students.ROWS,
    ):
        rows.append(row)
        if options.json:
            print(json.dumps({"part": "Every student", **row}), flush=True)
        if options.minutes and time.monotonic() - started > 60 * options.minutes:
            raise SystemExit(0)
    yield from ({"part": "Students", **row} for row in students.paired(rows))
    yield from ({"part": "Fidelity", **row} for row in students.fidelity(world, options.bytes))


def measured(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """All rows."""
    yield from texts(options)
    if options.quick:
        yield writing(256, 4, count=2, rounds=2, prompt=128)
        yield step(256, 2, count=2, rounds=2, prompt=128)
        yield opening(16)
        return
    yield writing(256, 4, count=4, rounds=5, prompt=128)
    yield writing(768, 12, count=4, rounds=5, prompt=128)
    yield writing(768, 12, count=4, rounds=5, prompt=0)
    yield step(512, 8, count=4, rounds=5, prompt=128)
    yield opening(512)


def main() -> None:
    parser = _results.parser(__doc__)
    parser.add_argument("--data", type=Path, help="Alpaca-style JSON: instruction, input, output")
    parser.add_argument("--work", type=Path, default=Path("runs/cache-benchmark"))
    parser.add_argument("--minutes", type=float, help="end after about so many; call again")
    parser.add_argument("--bytes", type=float, default=64, help="a token, of the other schemes")
    options = parser.parse_args()
    parts = _results.gathered(measured(options), as_json=options.json)
    _results.finish("cache", "The teacher cache", parts, options, note=NOTE)


if __name__ == "__main__":
    main()
