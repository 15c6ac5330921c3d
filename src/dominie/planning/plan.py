"""The plan of a recipe: what each of its stages needs on each device, and whether it fits."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dominie.core.errors import InputError
from dominie.core.hardware import Device, device_meant, device_named
from dominie.planning.cost import EFFICIENCY, Cost, stage_cost
from dominie.planning.fixes import Fix, FixSearch
from dominie.planning.memory import BYTES, Memory, Placement, StageSetup, TeacherSetup, stage_memory
from dominie.planning.sizes import (
    Shape,
    Size,
    Work,
    adapter_over_base,
    config_of,
    shape_of,
    source_sizes,
    work_of,
)
from dominie.planning.trace import Pass, traced
from dominie.recipe import Recipe, StageConfig
from dominie.recipe.validate import stage_order
from dominie.training.stage_sources import StageSource, layer_pairs

if TYPE_CHECKING:
    from dominie.recipe import TrainStage


@dataclass(frozen=True)
class Machine:
    """What a recipe is planned for.

    Attributes:
        device: each accelerator.
        count: how many.
        memory: bytes of each.
        sharded: whether weights are shared out over them; a single one holds all.
        price: of one for an hour, None where money is not asked for.
        efficiency: share of the roofline that training is taken to reach.
    """

    device: Device
    count: int
    memory: float
    sharded: bool
    price: float | None = None
    efficiency: float = EFFICIENCY


def machine(
    *,
    gpu: str | None = None,
    gpus: int | None = None,
    memory: float | None = None,
    price: float | None = None,
    sharded: bool = True,
    efficiency: float = EFFICIENCY,
) -> Machine:
    """What the options of the command line mean.

    Args:
        gpu: a name of the table; without it the one that `gpus` and `memory` speak of, else what
            this machine has.
        gpus: how many.
        memory: GB (10⁹ bytes) of each; the device's own without it.
        price: of a GPU hour.
        sharded: whether several share weights, gradients and optimiser.
        efficiency: share of the roofline.

    Raises:
        InputError: a GPU that is not known, or a number that is none.
    """
    for option, value in (("--gpus", gpus), ("--memory", memory), ("--price", price)):
        if value is not None and not 0 < value < float("inf"):
            raise InputError(
                "this cannot be planned for",
                where=option,
                expected="a number above 0",
                found=f"{value:g}",
            )
    if not 0 < efficiency <= 1:
        raise InputError(
            "no share of the roofline",
            where="--efficiency",
            expected="above 0, at most 1",
            found=f"{efficiency:g}",
        )
    device = device_named(gpu or device_meant(gpus, memory))
    count = gpus or 1
    gigabytes = device.memory if memory is None else memory
    return Machine(device, count, gigabytes * 1e9, sharded and count > 1, price, efficiency)


@dataclass(frozen=True)
class StagePlan:
    """A stage's needs.

    Attributes:
        name: of the stage.
        kind: `train`, or how it makes a model or data without training.
        shape: of its model; None if it makes data.
        teachers: shapes by name.
        machine: it is planned for.
        situation: what the memory was computed for; None where nothing is trained.
        memory: of a rank.
        weights: bytes of its model.
        activations: with and without gradient checkpointing.
        work: conversations, tokens, steps.
        cost: products and time.
        fix: what would make it fit, where it does not.
        measures: single changes and the peak after each, where it does not fit.
    """

    name: str
    kind: str
    shape: Shape | None
    teachers: Mapping[str, Shape]
    machine: Machine
    weights: float
    situation: StageSetup | None = None
    memory: Memory | None = None
    activations: Mapping[str, float] = dataclasses.field(default_factory=dict)
    work: Work | None = None
    cost: Cost | None = None
    fix: Fix | None = None
    measures: tuple[tuple[str, float], ...] = ()

    @property
    def peak(self) -> float:
        """Most bytes that a rank holds at once."""
        return self.memory.peak if self.memory else self.weights

    @property
    def fits(self) -> bool:
        """Whether a device holds it."""
        return self.peak <= self.machine.memory

    @property
    def money(self) -> float | None:
        """Of all devices for the stage's hours."""
        if self.machine.price is None:
            return None
        hours = self.cost.hours if self.cost else 0.0
        return hours * self.machine.price * self.machine.count


@dataclass(frozen=True)
class Plan:
    """The plans of all stages, in the order in which they run."""

    recipe: Recipe
    machine: Machine
    stages: Mapping[str, StagePlan]
    sizes: Mapping[str, Size]

    @property
    def fits(self) -> bool:
        """Whether every stage fits."""
        return all(stage.fits for stage in self.stages.values())


def plan_recipe(
    recipe: Recipe, on: Machine, *, conversations: int | None = None, tokens: float | None = None
) -> Plan:
    """Plan every stage; only configurations are read, and data where they are here.

    Args:
        recipe: the resolved recipe.
        on: what it is planned for.
        conversations: of a source; counted or assumed without it.
        tokens: of a conversation; estimated or assumed without it.

    Raises:
        InputError: a configuration that cannot be reached, or settings that do not fit together.
    """
    sizes = source_sizes(recipe, conversations=conversations, tokens=tokens)
    stages: dict[str, StagePlan] = {}
    for name in stage_order(recipe, where=recipe.name):
        stages[name] = recipe.stages[name].plan(recipe, name, on, sizes)
    return Plan(recipe, on, stages, sizes)


def plan_untrained(recipe: Recipe, name: str, stage: StageConfig, on: Machine) -> StagePlan:
    """Plan a stage that makes a model of others, or data: it costs the weights that it holds.

    A model is written a tensor at a time. Data are written by one of the models that are read.
    """
    if stage.makes == "model":
        shape = shape_of(config_of(recipe, name))
        weights = shape.parameters * float(BYTES[_dtype_of(recipe, name)])
        return StagePlan(name, stage.kind, shape, {}, on, weights)
    held = [
        shape_of(config_of(recipe, model)).parameters * float(BYTES[_dtype_of(recipe, model)])
        for model in stage.models
    ]
    return StagePlan(name, stage.kind, None, {}, on, max(held, default=0.0))


def plan_training(
    recipe: Recipe, name: str, stage: TrainStage, on: Machine, sizes: Mapping[str, Size]
) -> StagePlan:
    """Plan a stage that trains: memory of its phases, time, and what would make it fit."""
    situation, work = _situation(recipe, stage, on, sizes)
    memory = stage_memory(situation)
    kept = {}
    for checkpointing in (False, True):
        train = dataclasses.replace(situation.train, gradient_checkpointing=checkpointing)
        either = stage_memory(dataclasses.replace(situation, train=train))
        kept["with checkpointing" if checkpointing else "without checkpointing"] = (
            either.traced.activations
        )
    whole = sum(stage.data[source].share for source in stage.active)
    shares: dict[str, float] = {}
    for source in stage.active:
        if teacher := stage.teacher_on(source):
            shares[teacher] = shares.get(teacher, 0.0) + stage.data[source].share / whole
    cost = stage_cost(
        situation,
        device=on.device,
        tokens=work.tokens,
        steps=work.steps,
        trainable=memory.traced.trainable,
        shares=shares,
        efficiency=on.efficiency,
    )
    planned = StagePlan(
        name=name,
        kind=stage.kind,
        shape=shape_of(situation.student),
        teachers={t.name: shape_of(t.config) for t in situation.teachers},
        machine=on,
        weights=memory.traced.weights,
        situation=situation,
        memory=memory,
        activations=kept,
        work=work,
        cost=cost,
    )
    if planned.fits:
        return planned
    shop = FixSearch(
        name,
        places={**dict.fromkeys(recipe.models, "models"), **dict.fromkeys(recipe.stages, "stages")},
        caches=all(not stage.loss_on(source).needs_live_teacher for source in stage.active),
    )
    measures = sorted(
        ((change.words, peak) for change, peak in shop.measures(situation)), key=lambda m: m[1]
    )
    return dataclasses.replace(
        planned, fix=shop.fix(situation, on.memory), measures=tuple(measures)
    )


def _situation(
    recipe: Recipe, stage: TrainStage, on: Machine, sizes: Mapping[str, Size]
) -> tuple[StageSetup, Work]:
    train = stage.train
    micro_batch = train.conversations_per_forward(on.count)
    work = work_of(stage, sizes, micro_batch)
    student = config_of(recipe, stage.student)
    names = [n for n in stage.models if n in {stage.teacher_on(s) for s in stage.active}]
    configs = {teacher: config_of(recipe, teacher) for teacher in names}
    lessons = [
        StageSource(
            name=source,
            train=(),
            validation=(),
            share=stage.data[source].share,
            terms=stage.loss_on(source),
            teacher=stage.teacher_on(source),
        )
        for source in stage.active
    ]
    pairs, _ = layer_pairs(student, configs, lessons)
    compared = {x.teacher for x in lessons if x.terms.weighs("attention")}
    captured = len({teacher for _, teacher in pairs})
    teachers = tuple(
        TeacherSetup(
            teacher,
            config,
            _dtype_of(recipe, teacher),
            _placement(recipe, stage, teacher),
            captured if teacher in compared else 0,
            _adapter_weights(recipe, stage, teacher, config),
        )
        for teacher, config in configs.items()
    )
    situation = StageSetup(
        student=student,
        train=train,
        teachers=teachers,
        rows=work.rows,
        length=work.length,
        accumulates=train.batch // on.count > micro_batch,
        compares=any(lesson.terms.weighs("prediction") for lesson in lessons),
        routes=any(lesson.terms.weighs("router") for lesson in lessons),
        attention=len(pairs),
        ranks=on.count,
        sharded=on.sharded,
        on_cpu=on.device.is_cpu,
    )
    return situation, work


def _placement(recipe: Recipe, stage: TrainStage, teacher: str) -> Placement:
    """How a teacher is held: a mind over the student's base has no weights of its own."""
    taught = [source for source in stage.active if stage.teacher_on(source) == teacher]
    if set(taught) <= set(stage.cached):
        return "cached"
    over_base, _ = adapter_over_base(recipe, stage, teacher)
    alike = _dtype_of(recipe, teacher) == stage.train.precision
    held = recipe.placement(teacher)
    alike &= held in ("device", recipe.model(stage.student).held)
    if over_base and alike:
        return "shared"
    return "device" if held == "cached" else held  # what cannot learn from a cache


def _unmerged(stage: TrainStage) -> bool:
    return stage.train.lora is not None and not stage.train.lora.merge


def _adapter_weights(recipe: Recipe, over: TrainStage, teacher: str, config: Any) -> float:
    """Weights of the adapter that a stage wrote in place of a model, and `over` does not merge."""
    stage = recipe.trained.get(teacher)
    if stage is None or not _unmerged(stage) or adapter_over_base(recipe, over, teacher)[1] is None:
        return 0.0
    adapted = Pass(rows=1, length=2, dtype="bf16", trained=True, lora=stage.train.lora)
    return traced(config, adapted).trainable


def _dtype_of(recipe: Recipe, name: str) -> str:
    """The dtype a frozen model is held in: a stage's is that of its run."""
    if name in recipe.trained:
        return recipe.trained[name].train.precision
    if name in recipe.stages:
        return _dtype_of(recipe, recipe.stages[name].models[0])
    spec = recipe.model(name)
    if spec.dtype != "auto":
        return spec.dtype
    stored = str(getattr(config_of(recipe, name), "dtype", None)).removeprefix("torch.")
    return {"bfloat16": "bf16", "float16": "fp16"}.get(stored, "fp32")
