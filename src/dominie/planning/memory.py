"""Memory of a training stage on one rank, item by item, in every phase of a step."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch

from dominie.losses.tiles import rows_per_tile, tile_elements
from dominie.models.spec import Placement
from dominie.planning.sizes import Shape, shape_of
from dominie.planning.trace import Pass, Traced, router_loss_memory, traced
from dominie.training.settings import TrainSettings

BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}
#: Two moments in fp32 (Adam), whatever the precision of the run.
_OPTIMISER_BYTES = 8
#: What a process on a CPU comes to beside tensors after its imports: tokenising, the trainer, and
#: libraries that load late. Measured by `benchmarks/plan.py`.
_PROCESS = 60e6
#: Bytes of a rounded weight; in 4 bits every 64 share a factor in fp32.
_QUANTISED = {"8bit": 1.0, "4bit": 0.5 + 4 / 64}
#: Of a cached signal on a position: 64 ids of 4 bytes and probabilities of 2, and the tail.
CACHED_BYTES = 64 * 6 + 4


@dataclass(frozen=True)
class TeacherSetup:
    """A teacher of a stage.

    Attributes:
        name: as the recipe has it.
        config: its configuration.
        dtype: of its weights.
        placement: of these weights, see `dominie.models.spec.Model`.
        captured: its layers whose query and key are kept for the attention term.
        adapter: weights, fp32, that it adds to the student's base; None if it has its own base.
    """

    name: str
    config: Any
    dtype: str
    placement: Placement = "device"
    captured: int = 0
    adapter: float | None = None

    @property
    def has_weights(self) -> bool:
        """Whether it has a base of its own."""
        return self.adapter is None


@dataclass(frozen=True)
class StageSetup:
    """What the memory of a stage follows from; a fix is another setup of the same stage.

    Attributes:
        student: configuration.
        train: settings.
        teachers: models that it learns from.
        rows: of the largest micro-batch of a rank.
        length: of its rows.
        accumulates: whether a step has several micro-batches.
        compares: whether predictions are compared with a teacher's.
        routes: whether the loss has a term for the student's routers.
        attention: layers of the student in the attention term.
        ranks: processes, one a device.
        sharded: whether weights, gradients and optimiser are shared out over the ranks.
        offloaded: whether the optimiser and its fp32 weights are in the host's memory.
        on_cpu: whether the device is a CPU.
        device_memory: bytes of the device.
        base: bytes of the host's memory that keep what the student predicted as the stage began.
    """

    student: Any
    train: TrainSettings
    teachers: tuple[TeacherSetup, ...] = ()
    rows: int = 1
    length: int = 2048
    accumulates: bool = True
    compares: bool = False
    routes: bool = False
    attention: int = 0
    ranks: int = 1
    sharded: bool = False
    offloaded: bool = False
    on_cpu: bool = False
    device_memory: float = 80e9
    base: float = 0.0

    @property
    def ahead(self) -> int:
        """The student's micro-batches in a forward pass of a teacher."""
        train, ranks = self.train, self.ranks
        of_a_step = train.batch // ranks // train.conversations_per_forward(ranks)
        return min(train.micro_batches_ahead(ranks), of_a_step)

    @property
    def shards(self) -> int:
        """Parts that weights are cut into."""
        return self.ranks if self.sharded else 1

    @property
    def run(self) -> Pass:
        """The student's training pass."""
        train = self.train
        half = train.precision != "fp32"
        return Pass(
            rows=self.rows,
            length=self.length,
            dtype=train.precision if train.lora else "fp32",
            autocast=train.precision if half else None,
            trained=True,
            lora=train.lora,
            checkpointing=train.gradient_checkpointing,
        )


@dataclass(frozen=True)
class Memory:
    """Bytes of a rank: items of each phase of a step.

    Attributes:
        phases: items by phase.
        traced: the student's pass, as counted.
        host: bytes in the host's memory.
    """

    phases: Mapping[str, Mapping[str, float]]
    traced: Traced
    host: float = 0.0

    @property
    def totals(self) -> dict[str, float]:
        """Bytes of each phase."""
        return {name: sum(items.values()) for name, items in self.phases.items()}

    @property
    def peak_phase(self) -> str:
        """The phase that holds most."""
        totals = self.totals
        return max(totals, key=lambda name: totals[name])

    @property
    def peak(self) -> float:
        """Bytes of that phase."""
        return self.totals[self.peak_phase]

    @property
    def items(self) -> Mapping[str, float]:
        """Its items."""
        return self.phases[self.peak_phase]


def stage_memory(setup: StageSetup) -> Memory:
    """The memory of a rank in the phases of a step.

    A step is: the teachers' forward, the student's forward and the losses in it, the backward pass,
    the optimiser. Gradients are there from the second micro-batch on.
    """
    shape = shape_of(setup.student)
    run = traced(setup.student, setup.run)
    teachers = [_teacher(each, setup) for each in setup.teachers]
    shards = setup.shards
    gradients = run.gradients / shards
    optimiser = run.trainable * _OPTIMISER_BYTES / shards
    weights = run.weights / shards
    casts, kept_casts = run.casts, run.kept_casts
    gathered = 0.0
    if shards > 1:  # two layers at a time are whole, in the precision of the run
        gathered = 2 * shape.largest_layer * BYTES[setup.train.precision]
        casts = kept_casts = 0.0
    host = sum(teacher.host for teacher in teachers) + setup.base
    if setup.offloaded:
        host += optimiser + weights
        optimiser, weights = 0.0, weights * BYTES[setup.train.precision] / 4
    standing = {
        "student weights": weights,
        "optimiser": optimiser,
        "teacher weights": sum(teacher.weights for teacher in teachers),
        **(_process(setup) | {"base predictions": setup.base} if setup.on_cpu else {}),
    }
    before = {**standing, "gradients": gradients if setup.accumulates else 0.0}
    signal = max((teacher.signal for teacher in teachers), default=0.0)
    capture = max((teacher.capture for teacher in teachers), default=0.0)
    targets = {"teacher signal": signal, "attention capture": capture}
    kept = {"activations": run.activations, "weight casts": kept_casts}
    head = _head(setup, shape)
    router = (
        router_loss_memory(setup.student, setup.rows * setup.length) if setup.routes else (0.0, 0.0)
    )
    attention = _attention_work(setup, shape)
    phases = {
        "writing the cache": {"teacher": max((t.alone for t in teachers), default=0.0)},
        "teacher forward": {
            **before,
            "teacher activations": max((t.forward for t in teachers), default=0.0),
            **targets,
        },
        "student forward": {
            **before,
            **targets,
            **kept,
            "gathered layers": gathered,
            "working memory": max(0.0, run.forward - run.activations - run.casts)
            + max(0.0, casts - kept_casts),
        },
        "losses": {
            **before,
            **targets,
            **kept,
            "weight casts": casts,
            "logit tiles": head.tiles,
            "router loss": sum(router),
            "head gradients": head.gradients + head.states,
        },
        "backward": {
            **before,
            **targets,
            **kept,
            "router loss": router[0],
            "head gradients": head.states,
            "gathered layers": gathered,
            "working memory": max(0.0, run.backward - run.activations - run.kept_casts) + attention,
        },
        "optimiser step": {**standing, "gradients": gradients},
    }
    return Memory({n: {k: v for k, v in i.items() if v} for n, i in phases.items()}, run, host)


def _process(setup: StageSetup) -> dict[str, float]:
    """What a process on a CPU needs beside tensors."""
    loaded = [(setup.student, setup.run.dtype)]
    loaded += [
        (t.config, t.dtype) for t in setup.teachers if t.has_weights and t.placement == "device"
    ]
    joined = sum(shape_of(config).experts * BYTES[dtype] for config, dtype in loaded)
    return {"mapped files": float(joined), "process": _PROCESS}


@dataclass(frozen=True)
class _Teacher:
    weights: float
    forward: float
    signal: float
    capture: float
    host: float = 0.0
    alone: float = 0.0  # while it writes its cache, before the student is there


def _teacher(teacher: TeacherSetup, setup: StageSetup) -> _Teacher:
    """The memory of a teacher during its forward pass, and what is left after it."""
    shape, width = shape_of(teacher.config), BYTES[teacher.dtype]
    rows = setup.rows * setup.ahead
    tokens = rows * setup.length
    if teacher.placement == "cached":
        writer = _teacher(replace(teacher, placement="device"), setup)
        alone = writer.weights + writer.forward + writer.signal
        return _Teacher(0.0, 0.0, tokens * CACHED_BYTES, 0.0, alone=alone)
    run = traced(teacher.config, Pass(rows, setup.length, teacher.dtype))
    weights, host, gathered = run.weights, 0.0, 0.0
    layers = shape.in_layers * width
    if teacher.adapter is not None:
        weights = teacher.adapter * 4 / setup.shards
    elif teacher.placement == "cpu":  # embeddings and head stay, the rest comes a module at a time
        weights, host, gathered = weights - layers, layers, float(shape.largest_layer * width)
    elif teacher.placement == "sharded" and setup.ranks > 1:  # two layers at a time are whole
        weights -= layers * (1 - 1 / setup.ranks)
        gathered = 2.0 * shape.largest_layer * width
    elif teacher.placement in ("8bit", "4bit"):
        weights -= shape.quantisable * (width - _QUANTISED[teacher.placement])
    projections = (shape.heads + shape.key_heads) * shape.head_width
    return _Teacher(
        weights=weights,
        forward=run.forward + gathered,
        signal=tokens * shape.width * width if setup.compares else 0.0,
        capture=teacher.captured * tokens * projections * width,
        host=host,
    )


class _Head(NamedTuple):
    tiles: float
    gradients: float
    states: float


def _head(setup: StageSetup, shape: Shape) -> _Head:
    """The vocabulary losses: tiles of logits, gradients of states and head, both in fp32."""
    tokens = setup.rows * setup.length
    width = BYTES[setup.train.precision]
    sizes = [shape.vocabulary]
    if setup.compares:
        dense = [t.config for t in setup.teachers if t.placement != "cached"]
        sizes.append(max((shape_of(config).vocabulary for config in dense), default=0))
    device = torch.device("cpu" if setup.on_cpu else "cuda")
    tile = rows_per_tile(tokens, max(sizes), tile_elements(device, setup.device_memory))
    table = shape.vocabulary * shape.width
    trained = setup.train.lora is None
    slopes = 0 if setup.on_cpu or width == 4 else tile * shape.vocabulary * width
    return _Head(
        tiles=tile * sum(sizes) * 4 + slopes + (table * width if width < 4 and trained else 0),
        gradients=table * 4 if trained else 0,
        states=2 * tokens * shape.width * 4,
    )


def _attention_work(setup: StageSetup, shape: Shape) -> float:
    """What the attention term holds in a layer's backward: fp32 gradients, aligned copies."""
    if not setup.attention:
        return 0.0
    tokens = setup.rows * setup.length
    own = (shape.heads + shape.key_heads) * shape.head_width
    theirs = max(
        (s.heads + s.key_heads) * s.head_width
        for s in (shape_of(t.config) for t in setup.teachers if t.captured)
    )
    copies = 2 if setup.train.packing else 1
    return tokens * 4.0 * (own * (1 + copies) + theirs * copies)
