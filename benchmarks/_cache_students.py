"""Students trained from stored signals, beside students of the whole distribution.

A small teacher and a small student learn school mathematics with the 32,000-piece Mistral tokenizer
(V = 32,000); then, for every seed and every way to store the teacher, the student goes on from the
same weights over the same rows in the same order. What it hears goes through the bytes and back.
"""

from __future__ import annotations

import importlib.util
import json
import math
import statistics
import time
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from _cache_peers import BUDGET, RECOMMENDED, DistillKit

from dominie.data.batch import collate
from dominie.data.rows import prepare
from dominie.data.sources import Source
from dominie.losses import vocabulary_losses
from dominie.models.head import decoder, output_head
from dominie.teachers.cache_codec import Coder
from dominie.teachers.cache_sampling import CacheSettings, choose
from dominie.teachers.cache_writer import fidelity as measured
from dominie.teachers.cache_writer import measure_token_stats
from dominie.teachers.cached import target_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from torch import Tensor

HERE = Path(__file__).parent
SEEDS = range(5)
BATCH = 8
ROWS = 640  # of a student's training
HELD_OUT = 80
SHARED = {
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.06,
    "max_position_embeddings": 512,
    "sliding_window": None,
    "tie_word_embeddings": True,
}


def tokenizer() -> Any:
    """That of Mistral-7B-v0.1, as the example of a real run makes it."""
    path = HERE.parent / "examples" / "real_run" / "prepare.py"
    spec = importlib.util.spec_from_file_location("prepare", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.mistral_tokenizer()


def mistral(seed: int, vocabulary: int, width: int, layers: int) -> Any:
    from transformers import MistralConfig, MistralForCausalLM

    torch.manual_seed(seed)
    sizes = {"hidden_size": width, "intermediate_size": 3 * width, "num_hidden_layers": layers}
    return MistralForCausalLM(MistralConfig(**SHARED, **sizes, vocab_size=vocabulary))


@dataclass(frozen=True)
class World:
    """Rows, a teacher that learnt from them, and a student that has begun to."""

    train: Any
    held_out: Any
    teacher: Any
    student_weights: dict[str, Tensor]
    vocabulary: int

    def student(self) -> Any:
        """A student at its start."""
        model = mistral(0, self.vocabulary, 64, 2)
        model.load_state_dict(self.student_weights)
        return model


def made(data: Path, work: Path, *, teacher_steps: int, student_steps: int) -> World:
    """The world, its models trained once and kept in `work`."""
    work.mkdir(parents=True, exist_ok=True)
    words = tokenizer()
    source = Source(name="gsm8k", path=str(data), test_fraction=0.04)
    rows = prepare({"gsm8k": source}, words, max_length=320, cache=work / "rows")["gsm8k"]
    models = {}
    for name, width, layers, steps in (
        ("teacher", 128, 4, teacher_steps),
        ("student", 64, 2, student_steps),
    ):
        file = work / f"{name}.pt"
        model = mistral(1, len(words), width, layers)
        if file.exists():
            model.load_state_dict(torch.load(file))
        else:
            order = np.random.default_rng(7).permutation(len(rows.train))
            order = np.resize(order, steps * 16).reshape(steps, 16)
            learn(model, [[rows.train[i] for i in step] for step in order], None, rate=2e-3)
            torch.save(model.state_dict(), file)
        models[name] = model.eval()
    weights = models["student"].state_dict()
    return World(rows.train, rows.test[:HELD_OUT], models["teacher"], weights, len(words))


def learn(model: Any, steps: Sequence[Sequence[Any]], target: Any, *, rate: float) -> None:
    """Train on batches of rows: on `target(batch)`, or on the next token where that is None."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.0)
    warm = max(1, len(steps) // 10)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min(
            (step + 1) / warm, 0.5 + 0.5 * math.cos(math.pi * min(1, step / len(steps)))
        ),
    )
    model.train()
    for rows in steps:
        batch = collate([(0, row) for row in rows])
        hidden = decoder(model)(**batch.model_inputs()).last_hidden_state[batch.supervised]
        said = target(batch) if target else None
        labels = None if target else batch.labels[batch.supervised]
        head = output_head(model)
        loss = vocabulary_losses(hidden, head, said, labels=labels, metrics=False).total
        (loss / len(hidden)).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    model.eval()


@torch.no_grad()
def logits_of(teacher: Any, rows: Sequence[Any]) -> Tensor:
    batch = collate([(0, row) for row in rows])
    hidden = decoder(teacher)(**batch.model_inputs()).last_hidden_state[batch.supervised]
    return hidden @ output_head(teacher).weight.t()


class Store:
    """Stores through our coder; `bytes_used` over `tokens`."""

    def __init__(self, settings: CacheSettings, world: World) -> None:
        self.settings = settings
        rows = world.train[:48]
        self.vocabulary = measure_token_stats(
            world.teacher, rows, world.vocabulary, settings, temperature=1.0
        )
        self.coder = Coder.of(self.vocabulary, settings)
        pooled = self.vocabulary.is_pooled if settings.scheme == "threshold" else None
        self.pool = None if pooled is None else torch.from_numpy(pooled)
        self.bytes_used = self.tokens = 0

    def __call__(self, logits: Tensor, seed: int) -> Any:
        """What a reader gets back."""
        parts = []
        generator = np.random.default_rng([seed, zlib.crc32(logits[0, :16].numpy().tobytes())])
        for start in range(0, len(logits), 128):
            tile = logits[start : start + 128]
            draws = torch.from_numpy(self.settings.draws(len(tile), generator))
            code = self.coder.encoded(choose(tile, self.settings, draws, self.pool), b"")
            self.bytes_used += len(code)
            parts.append(self.coder.decoded(code, b""))
        self.tokens += len(logits)
        return target_of(parts, torch.device("cpu"), self.vocabulary.pool_shape)

    @property
    def bytes_per_token(self) -> float:
        """Of all that was stored so far."""
        return self.bytes_used / max(self.tokens, 1)


class Peer:
    """Stores as another project does."""

    def __init__(self, coding: DistillKit, vocabulary: int) -> None:
        self.coding, self.bytes_per_token = coding, float(coding.bytes_per_token(vocabulary))

    def __call__(self, logits: Tensor, seed: int) -> Any:
        """What a reader gets back."""
        return self.coding.stored(logits)


def fitted(scheme: str, world: World, budget: float) -> CacheSettings:
    """The settings of a scheme that come to at most `budget` bytes a token on a few rows."""
    logits = logits_of(world.teacher, world.train[24:32])
    grids = {
        "threshold": [{"threshold": 0.02 * 0.9**i} for i in range(40)],
        "sampled": [{"samples": round(8 * 1.08**i)} for i in range(50)],
        "top": [{"top_p": 1.0, "k_max": k} for k in range(8, 120)],
        "top-p": [{"top_p": 0.95, "k_max": k} for k in range(8, 400, 4)],
    }[scheme]
    best = None
    low, high = 0, len(grids) - 1
    while low <= high:
        middle = (low + high) // 2
        settings = CacheSettings(scheme=scheme.partition("-")[0], **grids[middle])
        store = Store(settings, world)
        store(logits, 0)
        if store.bytes_per_token <= budget:
            best, low = settings, middle + 1
        else:
            high = middle - 1
    return best or CacheSettings(scheme=scheme.partition("-")[0], **grids[0])


def ways(world: World, budget: float) -> dict[str, Callable[..., Any] | None]:
    """Every way to store what the teacher says; None is all of it."""
    named = {
        "threshold (default)": CacheSettings(),
        "threshold, nothing pooled": CacheSettings(threshold=0.0075, pooled=0.0),
        "sampled": fitted("sampled", world, budget),
        "top-p with tail": fitted("top-p", world, budget),
        "top-k with tail": fitted("top", world, budget),
    }
    return {
        "full distribution": None,
        **{name: Store(settings, world) for name, settings in named.items()},
        "DistillKit recommended": Peer(RECOMMENDED, world.vocabulary),
        "DistillKit budget": Peer(BUDGET, world.vocabulary),
    }


@torch.no_grad()
def held_out(world: World, student: Any) -> dict[str, float]:
    """KL(teacher ‖ student) in nats a token, and how often they hold the same token likeliest."""
    sums = torch.zeros(3, dtype=torch.float64)
    for start in range(0, len(world.held_out), 16):
        batch = collate([(0, row) for row in world.held_out[start : start + 16]])
        states = [
            decoder(model)(**batch.model_inputs()).last_hidden_state[batch.supervised]
            for model in (student, world.teacher)
        ]
        target = (states[1], output_head(world.teacher))
        found = vocabulary_losses(states[0], output_head(student), target).per_token
        sums += torch.stack(
            [
                found.divergence.double().sum(),
                found.agreement.double().sum(),
                torch.tensor(1.0 * len(states[0])),
            ]
        )
    return {"kl": float(sums[0] / sums[2]), "agreement": float(sums[1] / sums[2])}


def trained(world: World, way: Any, seed: int, rows: int) -> dict[str, float]:
    """One student's held-out figures."""
    order = np.random.default_rng(seed).permutation(len(world.train))[:rows]
    steps = [[world.train[i] for i in step] for step in order.reshape(-1, BATCH)]
    head = output_head(world.teacher)

    @torch.no_grad()
    def target(batch: Any) -> Any:
        inputs = batch.model_inputs()
        hidden = decoder(world.teacher)(**inputs).last_hidden_state[batch.supervised]
        return (hidden, head) if way is None else way(hidden @ head.weight.t(), seed)

    student = world.student()
    learn(student, steps, target, rate=1e-3)
    return held_out(world, student)


def rows_of_students(
    world: World,
    file: Path,
    *,
    budget: float,
    seeds: Sequence[int],
    rows: int,
    names: Sequence[str] = (),
) -> Iterator[dict[str, Any]]:
    """One row a student, appended to `file`; what stands there is not computed again.

    Args:
        world: rows and models.
        file: of the rows.
        budget: bytes a token of the ways that have no size of their own.
        seeds: of the students.
        rows: conversations that each learns from.
        names: of the ways, all if empty.
    """
    done = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    yield from done
    known = {(row["way"], row["seed"]) for row in done}
    found = ways(world, budget)
    chosen = {name: way for name, way in found.items() if not names or name in names}
    for seed in seeds:
        for name, way in chosen.items():
            if (name, seed) in known:
                continue
            started = time.monotonic()
            figures = trained(world, way, seed, rows)
            row = {
                "way": name,
                "seed": seed,
                "bytes": round(way.bytes_per_token, 1) if way else 4 * world.vocabulary,
                **{key: round(value, 6) for key, value in figures.items()},
                "seconds": round(time.monotonic() - started, 1),
            }
            if isinstance(way, Store):
                row["settings"] = way.settings.identity
            with file.open("a") as out:
                out.write(json.dumps(row) + "\n")
            yield row


#: Two-sided 95 % points of Student's t for the few degrees of freedom there are.
_T = {1: 12.71, 2: 4.30, 3: 3.18, 4: 2.78, 5: 2.57, 6: 2.45, 7: 2.36, 8: 2.31, 9: 2.26}


def paired(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row a way: held-out figures, and how far the KL is from full training's, in percent."""
    full = {row["seed"]: row for row in rows if row["way"] == "full distribution"}
    summary = []
    for name in dict.fromkeys(row["way"] for row in rows):
        own = [row for row in rows if row["way"] == name and row["seed"] in full]
        percent = [100 * (row["kl"] / full[row["seed"]]["kl"] - 1) for row in own]
        mean = statistics.mean(percent)
        spread = statistics.stdev(percent) if len(own) > 1 else math.nan
        half = _T.get(len(own) - 1, 1.96) * spread / math.sqrt(len(own))
        summary.append(
            {
                "way": name,
                "bytes": round(statistics.mean(row["bytes"] for row in own), 1),
                "kl": round(statistics.mean(row["kl"] for row in own), 4),
                "kl_excess_percent": round(mean, 2),
                "interval_percent": f"{mean - half:+.2f} … {mean + half:+.2f}",
                "agreement": round(statistics.mean(row["agreement"] for row in own), 4),
                "seeds": len(own),
            }
        )
    return summary


def fidelity(world: World, budget: float) -> list[dict[str, Any]]:
    """What is lost of the distributions themselves, on held-out rows."""
    logits = logits_of(world.teacher, world.held_out[:16])
    found = []
    for name, way in ways(world, budget).items():
        if way is not None:
            kept = measured(way(logits, 0), logits).as_dict()
            found.append({"way": name, "bytes": round(way.bytes_per_token, 1), **kept})
    return found
