"""Training at the paper's geometry: tokens a second, share of the bound, memory, beside plain code.

A Mixtral-8x7B teaches a Mistral-7B: random weights of those shapes, bf16 over fp32 weights and
Adam, every step the one that a stage's trainer takes (`dominie.training`), optimiser included. All
weights, gradients and moments of 32 layers do not fit one GPU: fewer layers are run, and
`full_depth_tokens_per_second` is what 32 would come to at the same share of the bound, by the ratio
of the operations of a token. Jobs:

* KD + attention; KD, of prediction alone; KD + attention with four conversations packed to a row;
* DAE online: two teachers of the student's shape, every row with its source's; one teacher: the
  same with one of them; DAE from cache; next token: no teacher at all.

`plain` does the same job in the same trainer as the authors' code does it: all logits of both
models, whole attention maps (KD + attention), both teachers on every row (DAE). Where it does not
fit, its micro-batch is halved until it does; what did not is said. The `loss` of the first step is
the same within a hundredth, or the row says what is `wrong`; but from a cache, where dominie takes
the teacher's entropy as it was stored, plain code what the stored samples come to.

`of_bound` is the time of the operations that the job needs (student forward and backward, its
teacher's forward, heads of supervised positions, attention loss; nothing recomputed) at the rate
of the device's data sheet, over the time taken; `of_matrix_speed` the same at the speed of a large
matrix product here; `mfu` counts the student's forward and backward alone. A CPU has no data sheet
here: its rate is that of the product.

    python benchmarks/geometry.py [--quick] [--json] [--seconds 170] [--rest]

On a GPU rows of 2,048 tokens, first by dominie and then plainly; with ``--rest`` those of 1,024.
``--quick`` runs tiny models of the same families through the same code within 50 seconds on two
cores; after ``--seconds`` no further job is begun, and what is left out is said. A job that fails
says so, and the others go on. A full run also writes a dated table to ``benchmarks/results``.
"""

from __future__ import annotations

import functools
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import _results
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
from _geometry_steps import TeacherSetup, fitting_steps
from _memory import prepare, released
from _results import GPU, Deadline, Row
from _speed import matrix_speed

from dominie.core.hardware import gpu_of_this_machine
from dominie.losses.terms import Attention, LossTerms, NextToken, Prediction
from dominie.planning.trace import with_layers
from dominie.training.stage_sources import StageSource

if TYPE_CHECKING:
    from collections.abc import Iterator

    from dominie.models.info import ModelFlops
    from dominie.teachers.cached import CachedTeacher

FULL_DEPTH = 32
LAYERS = 2
if GPU:  # eight need 79 GB
    LAYERS = 8 if torch.cuda.get_device_properties(0).total_memory > 100e9 else 6
#: Tokens of a forward pass, and forward passes of an optimiser step (the paper takes 64).
TOKENS, ACCUMULATED = (8192, 4) if GPU else (512, 1)
PLAIN = "plain"


@dataclass(frozen=True)
class Job:
    """What is taught to whom.

    Attributes:
        name: as the table has it.
        teachers: each with its share of the conversations.
        attention: whether maps are compared.
        cached: whether the teachers speak from a cache.
        packed: conversations to a row.
        plain: whether plain code does the same.
    """

    name: str
    teachers: tuple[tuple[str, float], ...] = (("mixtral", 1.0),)
    attention: bool = False
    cached: bool = False
    packed: int = 1
    plain: bool = True


ROUTED = (("reference", 0.9), ("expert", 0.1))
JOBS = (
    Job("KD + attention", attention=True),
    Job("KD"),
    Job("KD + attention, packed", attention=True, packed=4, plain=False),
    Job("DAE online", ROUTED),
    Job("one teacher", (("reference", 1.0),), plain=False),
    Job("DAE from cache", (("reference", 1.0),), cached=True),
    Job("next token", (), plain=False),
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


def job_row(
    laboratory: Laboratory, job: Job, length: int, scratch: Path, *, plain: bool, steps: int,
    deadline: Deadline, speed: float,
) -> tuple[Row, float | None]:  # fmt: skip
    """A job done by dominie, or plainly, as a row; and its tokens a second."""
    laboratory.only({"student", *(name for name, _ in job.teachers)})
    needed, whole = (laboratory.work(job, length, deep=deep) for deep in (False, True))
    micro_batch = max(1, TOKENS // length) * job.packed
    batch = micro_batch * ACCUMULATED
    sources = laboratory.sources(job, length, rows=2 * batch)
    gpu = gpu_of_this_machine()
    peak = gpu.half if gpu else speed
    found, note, wrong = None, "", ""
    if deadline.passed:
        note = "out of time"
    else:
        try:
            taught = laboratory.taught(job, sources, scratch, plain=plain)
            found, too_large = fitting_steps(
                laboratory.model("student"), taught, micro_batch=micro_batch,
                length=length, batch=batch, steps=steps, deadline=deadline,
            )  # fmt: skip
            if too_large:
                note = f"does not fit: {', '.join(map(str, too_large))} a pass"
        except ImportError as missing:
            if missing.name not in ("pyarrow", "pcodec"):  # which only a cache's files need
                raise
            note = f"needs {missing.name}"
        except Exception as error:
            wrong = _results.told(error)
    released()
    rate = batch * (length // job.packed) / found.seconds if found else None
    row: Row = {
        "part": f"L = {length}",
        "job": job.name,
        "method": PLAIN if plain else "dominie",
        "layers": LAYERS,
        "a_pass": found.micro_batch if found else None,
        "tokens_per_second": _rounded(rate),
        "step_seconds": _rounded(found.seconds if found else None, 3),
        "to_plain": None,
        "mfu": _percent(needed.student, rate, peak),
        "of_bound": _percent(needed.total, rate, peak),
        "of_matrix_speed": _percent(needed.total, rate, speed),
        "peak_gb": _gigabytes(found.peak if found else None),
        "with_models_gb": _gigabytes(
            (found.peak or 0) + found.standing if found and found.standing else None
        ),
        "full_depth_tokens_per_second": _rounded(
            rate * needed.total / whole.total if rate and GPU else None
        ),
        "steps": found.taken if found else 0,
        "loss": _rounded(found.loss if found else None, 4),
        "note": note or None,
        "wrong": wrong or None,
    }
    return row, rate


def _percent(operations: float, rate: float | None, speed: float) -> str | None:
    return None if rate is None else f"{100 * operations * rate / speed:.1f} %"


def _rounded(value: float | None, digits: int = 0) -> float | None:
    if value is None:
        return None
    return round(value, digits) if digits else int(value)


def _gigabytes(count: float | None) -> float | None:
    return None if count is None else round(count / 1e9, 2)


def measured(*, quick: bool, rest: bool, deadline: Deadline) -> Iterator[Row]:
    """All jobs of one length after the other, those by dominie first."""
    speed = matrix_speed()
    laboratory = Laboratory(LAYERS, tiny=not GPU)
    lengths = ((1024,) if rest else (2048,)) if GPU else (64,) if quick else (512, 256)
    for length in lengths:
        ours: dict[str, tuple[float | None, Any]] = {}
        with tempfile.TemporaryDirectory() as scratch:
            for plain, job in [(p, j) for p in (False, True) for j in JOBS if j.plain or not p]:
                row, rate = job_row(
                    laboratory, job, length, Path(scratch), plain=plain, deadline=deadline,
                    steps=1 if quick else 3, speed=speed,
                )  # fmt: skip
                if not plain:
                    ours[job.name] = rate, row["loss"]
                elif rate and ours[job.name][0]:
                    row["to_plain"] = round(ours[job.name][0] / rate, 2)
                    row["wrong"] = row["wrong"] or _differs(job, ours[job.name][1], row["loss"])
                yield row


def _differs(job: Job, ours: float, plains: float) -> str | None:
    if job.cached or abs(plains - ours) <= 0.01 * abs(ours):
        return None
    return f"its loss is {plains}, dominie's {ours}"


def main() -> None:
    options = _results.parser(__doc__, timed=True, rest=True).parse_args()
    prepare()
    rows = measured(quick=options.quick, rest=options.rest, deadline=Deadline(options.seconds))
    parts = _results.gathered(rows, as_json=options.json)
    note = (
        f"{LAYERS} of {FULL_DEPTH} layers of each model"
        + ("" if GPU else ", narrowed for a CPU: only ratios say anything")
        + f"; {TOKENS:,} tokens a forward pass, {ACCUMULATED} passes an optimiser step, three\n"
        "quarters of the tokens supervised. `peak_gb` is above the models' weights. No layer is\n"
        "recomputed. `to_plain`: tokens a second of dominie over plain's."
    )
    _results.finish("geometry", "Training at the paper's geometry", parts, options, note=note)


if __name__ == "__main__":
    main()
