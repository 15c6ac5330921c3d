"""Trains one stage: from loaded rows and named models to a folder that transformers loads."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import EarlyStoppingCallback, TrainerCallback, TrainingArguments, set_seed

from dominie.core.distributed import broadcast_from_main, init_distributed, is_sharded, world_mesh
from dominie.data.batch import Padding
from dominie.losses.objective import Objective
from dominie.models.adapters import SharedBase, shared_base
from dominie.models.head import check_head, text_config
from dominie.models.info import ModelFlops, describe, info_of, model_flops
from dominie.models.loading import load_student
from dominie.models.spec import Model
from dominie.teachers import AdapterTeacher, LocalTeacher, Teacher
from dominie.teachers.paired_rows import PairedRows
from dominie.teachers.span_teacher import SpanTeacher
from dominie.teachers.teacher import load_teacher
from dominie.training.callbacks import SaveAndStop, StopAtForgetting
from dominie.training.checkpoints import verified_checkpoint
from dominie.training.counters import FlopsMeter, peak_flops
from dominie.training.dataloader import Collator, FixedRows, StepSource
from dominie.training.export_model import save_model
from dominie.training.loss_forward import fused_layers, loss_in_forward
from dominie.training.metric_sums import MetricsLog
from dominie.training.monitoring import Monitor
from dominie.training.on_policy import on_policy_rows
from dominie.training.settings import TrainSettings, training_arguments
from dominie.training.source_weights import SourceWeights
from dominie.training.stage_sources import (
    StageTraining,
    attention_pairs,
    routed_teacher,
    span_teacher_name,
)
from dominie.training.time_limits import LimitTime
from dominie.training.trainer import DistillationTrainer
from dominie.training.validation import Validation

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class StageModels:
    """The models of a stage, by their specifications.

    Attributes:
        student: the model that is trained.
        tokenizer: the student's, with its chat template; saved beside the weights.
        teachers: by the names that the sources use.
        caches: teachers that read stored targets, by the names that the sources use.
        shared: which teachers share the student's base, of `shared_base_of`; None finds it out.
        pairs: the rows in the tokens of teachers that are compared with by spans, by their names.
    """

    student: Model
    tokenizer: Any
    teachers: Mapping[str, Model] = field(default_factory=dict)
    caches: Mapping[str, Teacher] = field(default_factory=dict)
    shared: SharedBase | None = None
    pairs: Mapping[str, PairedRows] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class LoadedModels:
    """The models of a stage, in memory.

    Attributes:
        student: the model that is trained.
        flops: what the student's FLOPs follow from, before a teacher's adapter is loaded into it.
        teachers: by the names that the sources use.
        caches: teachers that read stored targets, by the names that the sources use.
    """

    student: Any
    flops: ModelFlops
    teachers: Mapping[str, LocalTeacher] = field(default_factory=dict)
    caches: Mapping[str, Teacher] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Trained:
    """Figures of a stage that was trained, for `stage.json`."""

    steps: int
    supervised_tokens: int
    seconds: float
    parameters: int
    trainable_parameters: int
    token_shares: Mapping[str, float]
    loss_shares: Mapping[str, float]
    final: Mapping[str, Any]
    stopped: Mapping[str, Any] | None = None


def train_stage(
    stage: StageTraining, models: StageModels, *, callbacks: Sequence[TrainerCallback] = ()
) -> Trained:
    """Train, or go on from the newest whole checkpoint, and write `folder/model`.

    Args:
        stage: what is trained on and how.
        models: the student and its teachers.
        callbacks: progress displays.

    Raises:
        InputError: models that do not fit each other or the data.
        RunError: the loss ceased to be finite.
        Interrupted: a signal came, and a checkpoint was saved.
    """
    folder, settings = stage.folder, stage.settings
    set_seed(settings.seed)
    arguments = training_arguments(
        settings,
        folder / "checkpoints",
        steps=stage.schedule.steps,
        ranks=init_distributed().num_processes,
    )
    load_whole_models()
    ends = stage.ends_of_turn(models.tokenizer)  # what may fail, fails before the training
    loaded, counts = load_models(models, settings, arguments.device)
    stop, limit = SaveAndStop(), []
    if bounds := stage.bounds:
        where = f"stage {folder.name}"
        limit = [StopAtForgetting(bounds, by_loss=settings.loss_decides, where=where)]
    with (
        build_trainer(
            stage,
            loaded,
            arguments,
            tokenizer=models.tokenizer,
            callbacks=[stop, *limit, *callbacks],
        ) as trainer,
        stop.catching(),
    ):
        trainer.monitor.begin(trainer.model, trainer.accelerator)
        trainer.resume(broadcast_from_main(lambda: verified_checkpoint(folder / "checkpoints")))
    stop.check(where=f"stage {folder.name}, step {trainer.state.global_step}")
    stopped = limit[0].stopped if limit else None
    trained = Trained(
        steps=trainer.state.global_step,
        supervised_tokens=trainer.counters.supervised_tokens,
        seconds=round(trainer.counters.seconds, 1),
        token_shares=trainer.monitor.log.token_shares(),
        loss_shares=trainer.monitor.log.loss_shares(),
        final={"evaluation": trainer.monitor.log.evaluation((stopped or {}).get("kept_step"))},
        stopped=stopped,
        **counts,
    )
    save_model(trainer, folder / "model", models, settings, ends)
    load_whole_models()  # what stages after this one and evaluation load
    return trained


def load_whole_models() -> None:
    """From here on, have transformers load models whole, on every process.

    Once it knows of ZeRO-3 it cuts every model it loads. The student is to be read and checked
    before it is the engine's, and teachers never are.
    """
    from transformers.integrations import unset_hf_deepspeed_config

    unset_hf_deepspeed_config()


def load_models(
    models: StageModels, settings: TrainSettings, device: torch.device
) -> tuple[LoadedModels, dict[str, int]]:
    """Load the student, then its teachers, those over its base as adapters in it.

    Returns:
        The models, and how many parameters the student has and trains.
    """
    student = load_student(
        models.student,
        lora=settings.lora,
        precision=settings.precision,
        gradient_checkpointing=settings.gradient_checkpointing,
    )
    check_head(student, where=models.student.path)
    flops = model_flops(student)
    counts = {
        "parameters": sum(p.numel() for p in student.parameters()),
        "trainable_parameters": sum(p.numel() for p in student.parameters() if p.requires_grad),
    }
    shared = models.shared or shared_base_of(models.student, models.teachers, settings)
    mesh = world_mesh() if any(t.placed == "sharded" for t in models.teachers.values()) else None
    teachers: dict[str, LocalTeacher] = {
        name: AdapterTeacher(student, shared.adapters[name])
        if name in shared.adapters and name not in models.pairs
        else LocalTeacher(load_teacher(spec, tokenizer=models.tokenizer, device=device, mesh=mesh))
        for name, spec in models.teachers.items()
    }
    for name, pairs in models.pairs.items():
        spans = SpanTeacher(teachers[name].model, pairs.of, pairs.words)
        teachers[span_teacher_name(name)] = spans
    loaded = LoadedModels(student=student, flops=flops, teachers=teachers, caches=models.caches)
    return loaded, counts


def shared_base_of(
    student: Model,
    teachers: Mapping[str, Model],
    settings: TrainSettings,
) -> SharedBase:
    """Find the teachers that share the student's base; none if its weights are sharded."""
    if settings.lora is None or not teachers:
        return SharedBase({}, {})
    return shared_base(
        describe(student),
        {name: describe(spec) for name, spec in teachers.items()},
        lora=settings.lora,
        precision=settings.precision,
        sharded=is_sharded(settings.arguments),
    )


@contextlib.contextmanager
def build_trainer(
    stage: StageTraining,
    models: LoadedModels,
    arguments: TrainingArguments,
    *,
    tokenizer: Any = None,
    teacher: Teacher | None = None,
    steps: StepSource | None = None,
    callbacks: Sequence[TrainerCallback] = (),
) -> Iterator[DistillationTrainer]:
    """The trainer of a stage; within, the student's forward pass returns its losses.

    Args:
        stage: what is trained on and how.
        models: in memory.
        arguments: of transformers.
        tokenizer: the student's; needed where it answers itself, or its teacher reads answers.
        teacher: in place of those of `models`, for every batch.
        steps: where micro-batches come from; None is the stage's rows in the order of its schedule.
        callbacks: progress displays and the like.
    """
    sources, settings = stage.sources, stage.settings
    infos = {name: info_of(text_config(each.model)) for name, each in models.teachers.items()}
    pairs = attention_pairs(info_of(text_config(models.student)), infos, stage.active)
    teacher = teacher or routed_teacher(models.teachers, sources, pairs, models.caches, tokenizer)
    objective = Objective([source.terms for source in sources])
    routes = list(dict.fromkeys(source.target_provider for source in sources))
    collator = Collator(
        [routes.index(source.target_provider) for source in sources],
        settings.max_length if settings.packing else None,
        Padding.on(arguments.device, settings.max_length),
    )
    mix = stage.schedule.mix(settings, micro_batch=arguments.per_device_train_batch_size)
    rows = FixedRows({s.name: s.train for s in stage.active}, mix, collator)
    log = MetricsLog(stage.folder / "metrics.jsonl")
    if steps is None:
        steps = on_policy_rows(stage, rows, models.student, tokenizer, log) or rows
    flops = {name: each.flops() for name, each in models.teachers.items()}
    validation = Validation(
        sources,
        objective,
        collator=collator,
        teacher=teacher,
        batch=max(arguments.per_device_train_batch_size, 8),
        forgetting=settings.measures_forgetting,
    )
    early = [EarlyStoppingCallback(n)] if (n := settings.patience) and validation else []
    with (
        fused_layers(models.student, arguments, [each.model for each in models.teachers.values()]),
        loss_in_forward(models.student, objective, pairs.pairs),
    ):
        yield DistillationTrainer(
            models.student,
            arguments,
            settings,
            objective=objective,
            steps=steps,
            teacher=teacher,
            monitor=Monitor(
                sources=[source.name for source in sources],
                terms={t for t in objective.terms if any(s.terms.weighs(t) for s in stage.active)},
                epochs=stage.schedule.epochs,
                log=log,
                flops=FlopsMeter(
                    models.flops,
                    [None if s.cache else flops.get(s.teacher or "") for s in sources],
                    peak=peak_flops(settings.precision),
                ),
                validation=validation if validation else None,
            ),
            balance=SourceWeights(
                [source.name for source in sources],
                [source.share for source in sources],
                settings.balance,
                experts=[i for i, s in enumerate(sources) if s.share > 0 and not s.reference],
            ),
            callbacks=[LimitTime(stage), *callbacks, *early],
        )
