"""Where a cached teacher stops teaching what the live one does: temperatures, and itself.

    python benchmarks/cache_limits.py            # both tables of docs/cache.md, an hour on one core
    python benchmarks/cache_limits.py --quick    # temperatures 1 and 6 alone, fewer steps

A model of one layer and 256 tokens, whose logits have a deviation of 3, teaches another of the same
shape on random tokens. `temperatures` gives KL(teacher ‖ student) at temperature 1 in nats per
token, held out and trained on; `itself` that of a student that starts as its teacher.
"""

from __future__ import annotations

import argparse
import dataclasses
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import MistralConfig, MistralForCausalLM

from dominie.data.batch import Batch, collate
from dominie.data.shards import ShardWriter
from dominie.data.tokenization import Encoded
from dominie.losses.forward_pass import ForwardPass
from dominie.losses.objective import Objective
from dominie.losses.targets import Signal
from dominie.losses.terms import LossTerms, Prediction
from dominie.losses.vocabulary import vocabulary_losses
from dominie.models.head import decoder, output_head
from dominie.teachers import LocalTeacher
from dominie.teachers.cache import Cache, Identity, create
from dominie.teachers.cache_sampling import CacheSettings
from dominie.teachers.cache_writer import entries, in_batches, measure_token_stats
from dominie.teachers.cached import CachedTeacher

VOCABULARY, HIDDEN = 256, 32
SETTINGS = {
    "threshold 0.006": CacheSettings(),
    "threshold 0.002": CacheSettings(threshold=0.002),
    "sampled 50": CacheSettings(scheme="sampled"),
    "sampled 400": CacheSettings(scheme="sampled", samples=400),
    "top 64": CacheSettings(scheme="top"),
    "top 128": CacheSettings(scheme="top", k_max=128, top_p=0.995),
}
ITSELF = {
    "everything": CacheSettings(scheme="top", top_p=1.0, k_max=VOCABULARY, levels=10**9),
    "threshold 0.0006": CacheSettings(threshold=0.0006),
    "threshold 0.006": CacheSettings(),
    "sampled 50": CacheSettings(scheme="sampled"),
}


def model(seed: int) -> Any:
    """A Mistral of one layer."""
    torch.manual_seed(seed)
    config = MistralConfig(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        intermediate_size=2 * HIDDEN,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
        initializer_range=0.3,
        sliding_window=None,
    )
    return MistralForCausalLM(config).float()


class World:
    """A teacher, its rows, and students that learn from what provides its targets."""

    def __init__(self) -> None:
        self.teacher = model(1).eval().requires_grad_(False)
        generator = torch.Generator().manual_seed(5)
        weight = self.teacher.get_output_embeddings().weight
        weight.copy_(torch.randn(weight.shape, generator=generator) * 3 / HIDDEN**0.5)
        generator.manual_seed(0)
        rows = [
            Encoded(
                torch.randint(1, VOCABULARY, (24,), generator=generator).tolist(),
                [position >= 2 for position in range(24)],
            )
            for _ in range(120)
        ]
        self.train, self.held_out = rows[:96], rows[96:]

    def cached(self, settings: CacheSettings, t: float) -> CachedTeacher:
        """The teacher from a cache of its training rows."""
        folder = Path(tempfile.mkdtemp())
        identity = Identity(
            teacher="t",
            revision=None,
            weights="w",
            tokenizer="k",
            vocabulary=VOCABULARY,
            temperature=t,
            scheme=settings.identity,
        )
        stats = measure_token_stats(self.teacher, self.train, VOCABULARY, settings, temperature=t)
        create(folder, identity, stats, {})
        cache = Cache(folder, identity, remedy="")
        with ShardWriter(folder, owner=cache.owner) as writer:
            for rows in in_batches(self.train, range(len(self.train)), 2048):
                writer.add(
                    entries(self.teacher, rows, stats, settings, temperature=t, owner=cache.owner)
                )
        return CachedTeacher(cache)

    @torch.no_grad()
    def divergence(self, student: Any, rows: list[Encoded]) -> float:
        """KL(teacher ‖ student) at temperature 1, in nats per token."""
        batch = collate([(0, row) for row in rows])
        hidden = decoder(student)(**batch.model_inputs()).last_hidden_state[batch.supervised]
        target = LocalTeacher(self.teacher).signal(batch).parts[0].target
        losses = vocabulary_losses(hidden, output_head(student), target)
        assert losses.per_token.divergence is not None
        return float(losses.per_token.divergence.double().mean())

    def learnt(
        self, provider: Any, t: float, *, steps: int, rate: float, student: Any, decay: bool = True
    ) -> Any:
        """The student after so many steps of AdamW."""
        objective = Objective([LossTerms(prediction=Prediction(temperature=t))])
        optimiser = torch.optim.AdamW(student.parameters(), lr=rate, weight_decay=0.0)
        generator = torch.Generator().manual_seed(7)
        for step in range(steps):
            for group in optimiser.param_groups:
                group["lr"] = rate * (1 - step / steps if decay else 1)
            chosen = torch.randint(0, len(self.train), (16,), generator=generator).tolist()
            batch = collate([(0, self.train[index]) for index in chosen])
            forward = ForwardPass(
                decoder(student)(**batch.model_inputs()).last_hidden_state,
                output_head(student),
                labels=batch.labels,
                source_ids=batch.source_ids,
                signal=provider.signal(batch),
            )
            optimiser.zero_grad()
            (objective(forward).total / batch.supervised.sum()).backward()
            torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
            optimiser.step()
        return student.eval()


class Rounded(LocalTeacher):
    """A live teacher whose hidden states are rounded to bfloat16."""

    def signal(self, batch: Batch) -> Signal:
        """Its targets."""
        (part,) = super().signal(batch).parts
        target: Any = part.target
        target = dataclasses.replace(target, hidden=target.hidden.bfloat16().float())
        return Signal((dataclasses.replace(part, target=target),))


def temperatures(world: World, values: list[float], steps: int) -> None:
    """Print KL of students by temperature and settings, and the ratio to the live teacher's."""
    for t in values:
        live: tuple[float, float] | None = None
        for name, settings in {"live": None, **SETTINGS}.items():
            provider = (
                LocalTeacher(world.teacher) if settings is None else world.cached(settings, t)
            )
            student = world.learnt(provider, t, steps=steps, rate=5e-3, student=model(7))
            rows = (world.held_out, world.train)
            held_out, trained = (world.divergence(student, each) for each in rows)
            live = live or (held_out, trained)
            ratios = f"{held_out / live[0]:.2f} {trained / live[1]:.2f}"
            most = "" if settings is None else f" (at most T = {settings.most_temperature:.2f})"
            print(
                f"T={t:g} {name}{most}: {held_out:.3f} {trained:.3f}, of live {ratios}", flush=True
            )


def itself(world: World) -> None:
    """Print KL of a student that starts as its teacher, after 25 and 100 steps."""
    providers = {"live": LocalTeacher(world.teacher), "live, rounded": Rounded(world.teacher)}
    providers |= {name: world.cached(settings, 1.0) for name, settings in ITSELF.items()}
    for name, provider in providers.items():
        for rate in (1e-3, 1e-4):
            found = []
            for steps in (25, 100):
                student = model(1)
                student.load_state_dict(world.teacher.state_dict())
                world.learnt(provider, 1.0, steps=steps, rate=rate, student=student, decay=False)
                found.append(f"{world.divergence(student, world.held_out):.5f}")
            print(f"{name}, rate {rate:g}: {' '.join(found)} after 25 and 100 steps", flush=True)


def main() -> None:
    """Both tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true")
    quick = parser.parse_args().quick
    torch.set_num_threads(1)
    world = World()
    itself(world)
    values = [1.0, 6.0] if quick else [1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 10.0]
    temperatures(world, values, 60 if quick else 250)


if __name__ == "__main__":
    main()
