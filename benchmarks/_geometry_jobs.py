"""The jobs of `geometry.py`, and the models that do them."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from _geometry_models import (
    STUDENT,
    TEACHER,
    Work,
    configuration,
    conversations,
    made,
    products,
    work,
)
from _geometry_plain import PlainCache, PlainTeacher, plainly_taught
from _geometry_steps import TeacherSetup
from _results import GPU, there

from dominie.losses.terms import Attention, LossTerms, NextToken, Prediction
from dominie.planning.trace import with_layers
from dominie.training.stage_sources import StageSource

if TYPE_CHECKING:
    from pathlib import Path

    from dominie.models.info import ModelFlops
    from dominie.teachers.cached import CachedTeacher

FULL_DEPTH = 32
LAYERS = 2
if GPU:  # eight need 79 GB
    LAYERS = 8 if torch.cuda.get_device_properties(0).total_memory > 100e9 else 6


@dataclass(frozen=True)
class Job:
    """What is taught to whom.

    Attributes:
        name: as the table has it.
        teachers: each with its share of the conversations.
        attention: whether maps are compared.
        cached: whether the teachers speak from a cache.
        packed: conversations to a row.
        fused: whether the student has Liger's fused layers.
        wider: times as many tokens a pass as the others have.
        plain: whether plain code does the same.
    """

    name: str
    teachers: tuple[tuple[str, float], ...] = (("mixtral", 1.0),)
    attention: bool = False
    cached: bool = False
    packed: int = 1
    fused: bool = False
    wider: int = 1
    plain: bool = True

    @property
    def lacking(self) -> str:
        """What it needs and is not here."""
        if not self.fused or (GPU and there("liger_kernel")):
            return ""
        return "needs liger_kernel" if GPU else "needs a GPU"


ROUTED = (("reference", 0.9), ("expert", 0.1))
JOBS = (
    Job("KD + attention", attention=True),
    Job("KD"),
    Job("KD + attention, packed", attention=True, packed=4, plain=False),
    Job("DAE online", ROUTED),
    Job("one teacher", (("reference", 1.0),), plain=False),
    Job("DAE from cache", (("reference", 1.0),), cached=True),
    Job("next token", (), plain=False),
    Job("KD + attention, fused", attention=True, fused=True, plain=False),
    Job("KD + attention, fused, wider", attention=True, fused=True, wider=2, plain=False),
)


class Laboratory:
    """The models, made when they are first asked for, and the jobs done with them."""

    def __init__(self, layers: int, *, tiny: bool) -> None:
        self.configs = {
            name: configuration(TEACHER if name == "mixtral" else STUDENT, layers, tiny=tiny)
            for name in ("student", "mixtral", "reference", "expert")
        }
        self.models: dict[str, Any] = {}
        self._products: dict[tuple[str, bool], ModelFlops] = {}

    def products(self, name: str, *, deep: bool) -> ModelFlops:
        """The products of a model, as it is or at full depth; kept: that takes a second."""
        config = self.configs[name]
        family = config.model_type, deep
        if family not in self._products:
            self._products[family] = products(with_layers(config, FULL_DEPTH) if deep else config)
        return self._products[family]

    def work(self, job: Job, length: int, *, deep: bool) -> Work:
        """What a job computes of one token."""
        online = () if job.cached else job.teachers
        return work(
            self.products("student", deep=deep),
            [(self.products(name, deep=deep), share) for name, share in online],
            length // job.packed,
            attention=job.attention,
        )

    def model(self, name: str) -> Any:
        """A model by its part."""
        if name not in self.models:
            seed = list(self.configs).index(name)
            self.models[name] = made(self.configs[name], trained=name == "student", seed=seed)
        return self.models[name]

    def only(self, names: set[str]) -> None:
        """Forget all other models."""
        self.models = {name: model for name, model in self.models.items() if name in names}

    def sources(self, job: Job, length: int, rows: int) -> list[StageSource]:
        """A source for each teacher, or one without."""
        terms = LossTerms(prediction=Prediction(), attention=Attention() if job.attention else None)
        if not job.teachers:
            terms = LossTerms(next_token=NextToken())
        size = self.configs["student"].vocab_size
        return [
            StageSource(
                name=teacher or "labels", share=share, terms=terms, teacher=teacher, validation=[],
                train=conversations(rows, length // job.packed, size, seed=index),
                cache=f"cache of {teacher}" if job.cached else None,
            )
            for index, (teacher, share) in enumerate(job.teachers or ((None, 1.0),))
        ]  # fmt: skip

    def taught(
        self, job: Job, sources: list[StageSource], scratch: Path, *, plain: bool
    ) -> TeacherSetup:
        """Who teaches a job, and how."""
        student = self.model("student")
        models = {name: self.model(name) for name, _ in job.teachers}
        caches = {}
        if job.cached:
            caches = {
                str(each.cache): self.cache(each, scratch / str(each.teacher)) for each in sources
            }
            models = {}
        if not plain:
            return TeacherSetup(sources, models, caches)
        teacher: Any = PlainTeacher(list(models.values()), maps=job.attention)
        if job.cached:
            teacher = PlainCache(*caches.values(), student.config.vocab_size)
        loss_in_forward = functools.partial(
            plainly_taught, student, list(models.values()), maps=job.attention,
            sources=len(sources),
        )  # fmt: skip
        return TeacherSetup(sources, models, caches, (loss_in_forward, teacher))

    def cache(self, source: StageSource, folder: Path) -> CachedTeacher:
        """What a teacher says about a source's conversations, written down and opened."""
        from dominie.data.shards import ShardWriter
        from dominie.teachers import cache as caches
        from dominie.teachers.cache_sampling import CacheSettings
        from dominie.teachers.cache_writer import (
            batch_tokens,
            entries,
            in_batches,
            measure_token_stats,
        )
        from dominie.teachers.cached import CachedTeacher

        model, settings, rows = self.model(str(source.teacher)), CacheSettings(), source.train
        identity = caches.Identity(
            teacher=str(source.teacher), revision=None, weights="random", tokenizer="none",
            vocabulary=model.config.vocab_size, temperature=1.0, scheme=settings.identity,
        )  # fmt: skip
        if not caches.exists(folder):
            vocabulary = measure_token_stats(
                model, rows, identity.vocabulary, settings, temperature=1.0
            )
            caches.create(folder, identity, vocabulary, {})
            opened = caches.Cache(folder, identity, remedy="")
            with ShardWriter(folder, owner=opened.owner) as writer:
                for batch in in_batches(rows, range(len(rows)), batch_tokens(model)):
                    writer.add(
                        entries(
                            model,
                            batch,
                            opened.vocabulary,
                            settings,
                            temperature=1.0,
                            owner=opened.owner,
                        )
                    )
        return CachedTeacher(caches.Cache(folder, identity, remedy=""))
