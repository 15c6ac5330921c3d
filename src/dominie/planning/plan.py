"""Plans a recipe: what each stage needs on each device, what it costs, and whether it fits."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dominie.core.hardware import Machine as Machine
from dominie.core.hardware import machine as machine
from dominie.models.adapters import SharedBase, shared_base
from dominie.models.info import ModelInfo, Workload
from dominie.models.spec import Placement
from dominie.planning.cost import Cost, Fix, FixSearch, stage_cost
from dominie.planning.memory import BYTES, Memory, StageSetup, TeacherSetup, stage_memory
from dominie.planning.sizes import (
    Shape,
    Size,
    Work,
    plan_info,
    shape_of,
    source_sizes,
    work_of,
)
from dominie.planning.trace import Pass, traced
from dominie.recipe import Recipe, StageConfig
from dominie.recipe.validate import stage_order
from dominie.training.stage_sources import StageSource, attention_pairs

if TYPE_CHECKING:
    from dominie.recipe import AnswersStage, TrainStage
    from dominie.training.settings import TrainSettings


@dataclass(frozen=True)
class StagePlan:
    """A stage's needs.

    Attributes:
        name: of the stage.
        kind: `train`, or how it makes a model or data without training.
        shape: of its model; None if it makes data.
        teachers: shapes by name.
        machine: it is planned for.
        setup: what the memory was computed for; None if nothing is trained.
        memory: of a rank.
        weights: bytes of its model; where answers are written, and of their keys and values.
        activations: with and without gradient checkpointing.
        work: conversations, tokens, steps.
        cost: FLOPs and time; where answers are written, if none is shorter than it may be.
        fix: what would make it fit, if it does not.
        measures: single changes and the peak after each, if it does not fit.
    """

    name: str
    kind: str
    shape: Shape | None
    teachers: Mapping[str, Shape]
    machine: Machine
    weights: float
    setup: StageSetup | None = None
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
    """Plan every stage; only configurations are read, and data if they are here.

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

    A model is written a tensor at a time. Models that run are loaded one at a time.
    """
    makes_model = stage.makes == "model"
    made = [name] if makes_model else []
    models = [plan_info(recipe, model) for model in (*made, *stage.loaded)]
    shapes = [shape_of(_config(info)) for info in models]
    sizes = [
        shape.parameters * float(BYTES[info.dtype or "fp32"])
        for shape, info in zip(shapes, models, strict=True)
    ]
    shape = shapes[0] if makes_model else None
    return StagePlan(name, stage.kind, shape, {}, on, max(sizes, default=0.0))


def plan_answers(
    recipe: Recipe, name: str, stage: AnswersStage, on: Machine, sizes: Mapping[str, Size]
) -> StagePlan:
    """Plan a stage that writes answers, as if each of them had the greatest length.

    A token is written for all answers of a batch at once, by one pass over the weights and over
    the keys and values so far.
    """
    planned, answers = plan_untrained(recipe, name, stage, on), stage.answers
    info, source = plan_info(recipe, answers.model), sizes[answers.source]
    shape, dtype = shape_of(_config(info)), info.dtype or "fp32"
    prompt, longest = (min(n, recipe.train.max_length) for n in (source.mean, source.longest))
    width = 2 * shape.layers * shape.key_heads * shape.head_width * BYTES[dtype]  # of a token
    count = source.conversations * answers.samples / on.count
    length = prompt + answers.max_new_tokens
    flops = shape.flops.forward(Workload.of_a_token(shape.flops.attended, length))
    passes = count / answers.batch * answers.max_new_tokens
    seconds = {
        "compute": count * length * flops / on.device.flops(dtype),
        "memory": passes
        * (planned.weights + answers.batch * width * (prompt + length) / 2)
        / on.device.bandwidth,
    }
    hours = max(seconds.values()) / on.efficiency / 3600
    rate = on.count * count * answers.max_new_tokens / max(hours * 3600, 1e-9)
    held = planned.weights + answers.batch * width * (longest + answers.max_new_tokens)
    cost = Cost(0.0, flops, seconds, hours, rate)
    return dataclasses.replace(planned, weights=held, cost=cost)


def plan_training(
    recipe: Recipe, name: str, stage: TrainStage, on: Machine, sizes: Mapping[str, Size]
) -> StagePlan:
    """Plan a stage that trains: memory of its phases, time, and what would make it fit."""
    setup, work = _setup(recipe, stage, on, sizes)
    memory = stage_memory(setup)
    kept = {}
    for checkpointing in (False, True):
        train = dataclasses.replace(setup.train, gradient_checkpointing=checkpointing)
        either = stage_memory(dataclasses.replace(setup, train=train))
        kept["with checkpointing" if checkpointing else "without checkpointing"] = (
            either.traced.activations
        )
    whole = sum(stage.data[source].share for source in stage.active)
    shares: dict[str, float] = {}
    for source in stage.active:
        if (teacher := stage.teacher_on(source)) and teacher not in recipe.served:
            shares[teacher] = shares.get(teacher, 0.0) + stage.data[source].share / whole
    cost = stage_cost(
        setup,
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
        shape=shape_of(setup.student),
        teachers={t.name: shape_of(t.config) for t in setup.teachers},
        machine=on,
        weights=memory.traced.weights,
        setup=setup,
        memory=memory,
        activations=kept,
        work=work,
        cost=cost,
    )
    if planned.fits:
        return planned
    search = FixSearch(
        name,
        places={**dict.fromkeys(recipe.models, "models"), **dict.fromkeys(recipe.stages, "stages")},
        caches=all(not stage.loss_on(source).needs_live_teacher for source in stage.active),
    )
    measures = sorted(
        ((change.text, peak) for change, peak in search.single_changes(setup)), key=lambda m: m[1]
    )
    return dataclasses.replace(planned, fix=search.fix(setup, on.memory), measures=tuple(measures))


def _setup(
    recipe: Recipe, stage: TrainStage, on: Machine, sizes: Mapping[str, Size]
) -> tuple[StageSetup, Work]:
    train = stage.train
    micro_batch = train.conversations_per_forward(on.count)
    work = work_of(stage, sizes, micro_batch)
    student = plan_info(recipe, stage.student)
    here = {stage.teacher_on(source) for source in stage.active} - recipe.served.keys()
    infos = {name: _as_teacher(recipe, name) for name in stage.models if name in here}
    sources = [
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
    pairs = attention_pairs(student, infos, sources)
    live = {stage.teacher_on(source) for source in {*stage.active} - {*stage.cached}}
    shared = shared_base(
        student,
        {name: info for name, info in infos.items() if name in live},
        lora=train.lora,
        precision=train.precision,
        sharded=on.sharded,
    )
    teachers = tuple(
        TeacherSetup(
            name,
            _config(info),
            info.dtype or "fp32",
            _live_placement(info) if name in live else "cached",
            len(pairs.layers_of(name)),
            _adapter_weights(recipe, shared, info),
        )
        for name, info in infos.items()
    )
    setup = StageSetup(
        student=_config(student),
        train=train,
        teachers=teachers,
        rows=work.rows,
        length=work.length,
        accumulates=train.batch // on.count > micro_batch,
        compares=any(source.terms.weighs(t) for source in sources for t in ("prediction", "spans")),
        routes=any(source.terms.weighs("router") for source in sources),
        attention=len(pairs.pairs),
        ranks=on.count,
        sharded=on.sharded,
        on_cpu=on.device.is_cpu,
        device_memory=on.memory,
        base=_base_bytes(recipe, train, shape_of(_config(student)), sizes) / on.count,
    )
    return setup, work


def _base_bytes(
    recipe: Recipe, train: TrainSettings, shape: Shape, sizes: Mapping[str, Size]
) -> float:
    """Bytes of what a student predicted on the held-out rows: states, and a head that is trained.

    Every token is counted as supervised, which is the most that there can be.
    """
    if not train.measures_forgetting:
        return 0.0
    tokens = 0.0
    for name, source in recipe.sources.items():
        left = 1.0 - source.validation_fraction - source.test_fraction
        held_out = sizes[name].conversations * source.validation_fraction / max(left, 1e-6)
        tokens += min(train.evaluate_rows, held_out) * min(sizes[name].mean, train.max_length)
    head = shape.vocabulary if train.lora is None else 0
    return (tokens + head) * shape.width * BYTES[train.precision]


def _config(info: ModelInfo) -> Any:
    return info.need("config", use="a plan")


def _as_teacher(recipe: Recipe, name: str) -> ModelInfo:
    """Describe a model that is placed as the recipe places teachers."""
    info = plan_info(recipe, name)
    if info.spec is None:
        return info
    placed = dataclasses.replace(info.spec, placement=recipe.placement(name), quantize=None)
    return dataclasses.replace(info, spec=placed)


def _live_placement(info: ModelInfo) -> Placement:
    """Where a teacher's weights are placed if it is not cached on every source."""
    placement = info.spec.placed if info.spec else "device"
    return "device" if placement == "cached" else placement


def _adapter_weights(recipe: Recipe, shared: SharedBase, info: ModelInfo) -> float | None:
    """Weights of a teacher's adapter over the student's base; None if it has a base of its own."""
    if info.name not in shared.adapters:
        return None
    adapter = shared.adapters[info.name]
    stage = recipe.trained.get(adapter or "")
    if stage is None:
        return 0.0
    adapted = Pass(rows=1, length=2, dtype="bf16", trained=True, lora=stage.train.lora)
    return traced(info.config, adapted).trainable
