"""What the setup of a stage costs in time, and which changes of it would fit a device."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from dominie.core.hardware import EFFICIENCY, NETWORK, PER_MACHINE, Device
from dominie.models.info import Workload
from dominie.models.spec import Placement
from dominie.planning.memory import BYTES, StageSetup, TeacherSetup, stage_memory
from dominie.planning.sizes import shape_of, training_flops
from dominie.training.settings import Lora


@dataclass(frozen=True)
class Cost:
    """What a stage costs.

    Attributes:
        student_flops: per token: forward, backward, and the forward that checkpointing repeats.
        teacher_flops: per token, of its teachers' forward.
        seconds: of each bound, at full rate: compute, memory traffic, traffic between devices.
        hours: of the whole stage, at the stated share of the bound that binds.
        tokens_per_second: over all devices.
    """

    student_flops: float
    teacher_flops: float
    seconds: Mapping[str, float]
    hours: float
    tokens_per_second: float

    @property
    def bound(self) -> str:
        """Which of the bounds binds."""
        return max(self.seconds, key=lambda name: self.seconds[name])


def stage_cost(
    setup: StageSetup,
    *,
    device: Device,
    tokens: float,
    steps: int,
    trainable: float,
    shares: Mapping[str, float],
    efficiency: float = EFFICIENCY,
) -> Cost:
    """What a stage costs on `setup.ranks` devices.

    Args:
        setup: the stage.
        device: each of them.
        tokens: that the stage reads in all.
        steps: of the optimiser.
        trainable: parameters with a gradient.
        shares: of the tokens that each teacher has targets for.
        efficiency: share of the bound that is reached.
    """
    shape, train, ranks = shape_of(setup.student), setup.train, setup.ranks
    student = training_flops(setup.student, train.lora)
    token = Workload.of_a_token(student.attended, setup.length)
    own = student.training(token)
    own += student.forward(token) if train.gradient_checkpointing else 0.0
    passes = 2.0 if setup.train.lora else 3.0  # frozen weights get no gradient
    passes += 1.0 if setup.train.gradient_checkpointing else 0.0
    live = [t for t in setup.teachers if t.placement != "cached"]
    taught = 0.0
    for teacher in live:
        flops = shape_of(teacher.config).flops
        work = Workload.of_a_token(flops.attended, setup.length)
        taught += shares.get(teacher.name, 0.0) * flops.forward(work)
    # Both attention maps once more, and two matrix products with their difference.
    taught += 4 * setup.attention * shape.heads * shape.head_width * setup.length
    width = BYTES[train.precision]
    forwards = steps * train.batch / ranks / train.conversations_per_forward(ranks)  # of a rank
    moved = forwards * passes * shape.parameters * width
    moved += (
        forwards / setup.ahead * sum(shape_of(t.config).parameters * BYTES[t.dtype] for t in live)
    )
    moved += steps * trainable * 28 / setup.shards  # weight, gradient and moments, there and back
    seconds = {
        "compute": tokens * (own + taught) / (ranks * device.flops(train.precision)),
        "memory": moved / device.bandwidth,
    }
    if ranks > 1:
        seconds["network"] = _sent(setup, forwards, steps, trainable) / _link(device, ranks)
    hours = max(seconds.values()) / efficiency / 3600
    return Cost(own, taught, seconds, hours, tokens / max(hours * 3600, 1e-9))


def _link(device: Device, ranks: int) -> float:
    """Bytes a second in which a rank gathers from all others.

    Between machines rings run over all network cards of each, and inside it what came is passed on.
    """
    return device.link if ranks <= PER_MACHINE else min(device.link, PER_MACHINE * NETWORK)


def _sent(setup: StageSetup, forwards: float, steps: int, trainable: float) -> float:
    """Bytes each rank receives: gathered weights and summed gradients, or gradients alone."""
    others = (setup.ranks - 1) / setup.ranks
    sharded = [t for t in setup.teachers if t.placement == "sharded"]
    passes = forwards / setup.ahead  # of a teacher
    gathered = passes * sum(shape_of(t.config).in_layers * BYTES[t.dtype] for t in sharded)
    if not setup.sharded:
        return (2 * steps * trainable * 4 + gathered) * others
    width = BYTES[setup.train.precision]
    gathers = 3 if setup.train.gradient_checkpointing else 2
    weights = shape_of(setup.student).parameters * width * gathers + trainable * 4
    return (forwards * weights + gathered) * others


#: An adapter's rank if one is proposed: peft's and QLoRA's habitual size.
_LORA = Lora(r=16, alpha=32)
_MOST_RANKS = 64
#: Other placements of a teacher, from what costs least.
_PLACEMENTS: tuple[Placement, ...] = ("cached", "8bit", "sharded", "4bit", "cpu")


@dataclass(frozen=True)
class Change:
    """Something to change about a stage.

    Attributes:
        text: for a person.
        how: overrides of the recipe and options of the planner, as they are typed; empty if
            there is no key for it yet.
        setup: the stage, so changed.
    """

    text: str
    how: tuple[str, ...]
    setup: StageSetup


@dataclass(frozen=True)
class Fix:
    """Changes that make a stage fit, and the bytes it then needs."""

    text: str
    how: tuple[str, ...]
    peak: float


_Step = Callable[[StageSetup], Change | None]


@dataclass(frozen=True)
class FixSearch:
    """Makes changes to one stage.

    Args:
        stage: its name in the recipe.
        places: of teachers that a recipe has a key for, under which part of it they stand.
        caches: whether a cache holds all that the stage compares with.
    """

    stage: str
    places: Mapping[str, str] = field(default_factory=dict)
    caches: bool = False

    def fix(self, setup: StageSetup, memory: float) -> Fix | None:
        """The smallest change after which the stage needs no more than `memory` bytes."""
        for steps in self._plans():
            changed = setup
            changes: list[Change] = []
            for step in steps:
                if (change := step(changed)) is not None:  # else it is so already, or cannot be
                    changes.append(change)
                    changed = change.setup
            if changes and (peak := stage_memory(changed).peak) <= memory:
                text = ", ".join(change.text for change in changes)
                return Fix(text, tuple(how for each in changes for how in each.how), peak)
        return None

    def single_changes(self, setup: StageSetup) -> Iterator[tuple[Change, float]]:
        """Every single change that applies, with the bytes the stage then needs."""
        steps: list[_Step] = [self._checkpointing, self._micro_batch(1), self._lora]
        placements: tuple[Placement, ...] = ("8bit", "4bit", "sharded", "cpu", "cached")
        steps += [self._placed(placement, known=False) for placement in placements]
        steps += [self._offloaded, self._ranks(8)]
        for step in steps:
            if (change := step(setup)) is not None:
                yield change, stage_memory(change.setup).peak

    def _plans(self) -> Iterator[tuple[_Step, ...]]:
        """From what changes nothing but speed to what changes what is trained, or costs more."""
        frugal = (self._checkpointing, self._micro_batch(1))
        yield from ((self._micro_batch(n),) for n in (64, 32, 16, 8, 4, 2, 1))
        yield (self._checkpointing,)
        yield from ((self._checkpointing, self._micro_batch(n)) for n in (8, 4, 2, 1))
        for before in ((), frugal[:1], frugal[1:], frugal):
            for placement in _PLACEMENTS:
                yield (*before, self._placed(placement, known=True))
        for lora in ((self._lora,), (self._lora, *frugal[:1]), (self._lora, *frugal)):
            yield lora
            yield from ((*lora, self._placed(each, known=True)) for each in _PLACEMENTS)
        ranks = 2
        while ranks <= _MOST_RANKS:
            yield (self._ranks(ranks),)
            yield (self._ranks(ranks), *frugal)
            yield (self._ranks(ranks), self._placed("sharded", known=True))
            yield (self._ranks(ranks), self._placed("sharded", known=True), *frugal)
            ranks *= 2
        yield (self._lora, *frugal, self._ranks(8))

    def _micro_batch(self, size: int) -> _Step:
        def step(now: StageSetup) -> Change | None:
            train = now.train
            micro_batch = train.conversations_per_forward(now.ranks)
            ahead = train.teacher_micro_batch or 0
            if size >= micro_batch or (train.batch // now.ranks) % size or ahead % size:
                return None
            rows = max(1, round(now.rows * size / micro_batch))
            changed = replace(
                now,
                train=replace(train, micro_batch=size),
                rows=rows,
                accumulates=train.batch // now.ranks > size,
            )
            how = f"stages.{self.stage}.train.micro_batch={size}"
            return Change(f"micro_batch {size}", (how,), changed)

        return step

    def _checkpointing(self, now: StageSetup) -> Change | None:
        if now.train.gradient_checkpointing:
            return None
        train = replace(now.train, gradient_checkpointing=True)
        how = f"stages.{self.stage}.train.gradient_checkpointing=true"
        changed = replace(now, train=train)
        return Change("gradient checkpointing", (how,), changed)

    def _lora(self, now: StageSetup) -> Change | None:
        if now.train.lora is not None:
            return None
        train = replace(now.train, lora=_LORA)
        how = f"stages.{self.stage}.train.lora={{r: {_LORA.r}, alpha: {_LORA.alpha:g}}}"
        return Change(f"LoRA (r {_LORA.r})", (how,), replace(now, train=train))

    def _placed(self, placement: Placement, *, known: bool) -> _Step:
        """Teachers placed another way; `known` asks for ways that a recipe has a key for."""

        def step(now: StageSetup) -> Change | None:
            places = {"device", "sharded"} - {placement}
            movable = [t for t in now.teachers if t.has_weights and t.placement in places]
            if not movable:
                return None
            how: tuple[str, ...] = ()
            texts = {
                "cached": "a cached teacher",
                "cpu": "a teacher in the host's memory",
                "sharded": "a teacher sharded over the GPUs",
            }
            if placement == "cached":
                if not self.caches:
                    return None  # maps, say
                how = (f"stages.{self.stage}.cache=true",)
            elif not _possible(placement, movable, now):
                return None
            elif all(t.name in self.places for t in movable):
                how = tuple(
                    f"{self.places[t.name]}.{t.name}.placement={placement}" for t in movable
                )
            if known and not how:
                return None
            changed = replace(now, teachers=placed(now.teachers, placement))
            return Change(texts.get(placement, f"a teacher in {placement}"), how, changed)

        return step

    def _offloaded(self, now: StageSetup) -> Change | None:
        if now.on_cpu or now.offloaded or now.train.lora:
            return None
        changed = replace(now, offloaded=True)
        return Change("optimiser in the host's memory", (), changed)

    def _ranks(self, ranks: int) -> _Step:
        def step(now: StageSetup) -> Change | None:
            if now.on_cpu or ranks <= now.ranks or now.train.batch % ranks:
                return None
            share = now.train.batch // ranks
            if now.train.micro_batch and share % now.train.micro_batch:
                return None
            micro_batch = now.train.conversations_per_forward(ranks)
            if (now.train.teacher_micro_batch or 0) % micro_batch:
                return None
            before = now.train.conversations_per_forward(now.ranks)
            changed = replace(
                now,
                ranks=ranks,
                sharded=True,
                rows=max(1, round(now.rows * micro_batch / before)),
                accumulates=share > micro_batch,
            )
            return Change(f"sharding over {ranks} GPUs", (f"--gpus {ranks}",), changed)

        return step


def _possible(placement: Placement, teachers: Sequence[TeacherSetup], now: StageSetup) -> bool:
    """Whether teachers can be placed so and it would save anything."""
    if placement == "cpu":
        return not now.on_cpu
    return now.ranks > 1 if placement == "sharded" else _quantisable(teachers)


def _quantisable(teachers: Sequence[TeacherSetup]) -> bool:
    """Whether matrices that are rounded are most of them."""
    shapes = [shape_of(teacher.config) for teacher in teachers]
    return all(shape.quantisable > 0.5 * shape.parameters for shape in shapes)


def placed(teachers: Sequence[TeacherSetup], placement: Placement) -> tuple[TeacherSetup, ...]:
    """The same teachers, placed another way; those over the student's base stay, if not cached."""
    if placement == "cached":
        return tuple(replace(t, placement="cached", captured=0, adapter=None) for t in teachers)
    return tuple(replace(t, placement=placement) if t.has_weights else t for t in teachers)
