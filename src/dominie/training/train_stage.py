"""Trains one stage: from loaded rows and named models to a folder that transformers loads."""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import EarlyStoppingCallback, TrainerCallback, TrainingArguments, set_seed

from dominie.core.distributed import broadcast_from_main, init_distributed, world_mesh
from dominie.core.errors import RunError
from dominie.data.sampling import Mix, total_conversations
from dominie.losses.objective import Objective
from dominie.losses.terms import TERMS
from dominie.models.adapters import SharedBase, merged, shared_base
from dominie.models.export import prepare_export
from dominie.models.flops import ModelFlops, model_flops
from dominie.models.head import check_head, text_config
from dominie.models.info import describe, info_of
from dominie.models.loading import DTYPES, load_student
from dominie.models.spec import Model
from dominie.teachers import AdapterTeacher, LocalTeacher, Teacher
from dominie.teachers.teacher import load_teacher
from dominie.training.arguments import load_whole_models, training_arguments
from dominie.training.callbacks import SaveAndStop
from dominie.training.checkpoints import newest_checkpoint, publish, writing
from dominie.training.counters import FlopsMeter, peak_flops
from dominie.training.dataloader import Collator, MixedRows
from dominie.training.loss_forward import loss_in_forward
from dominie.training.metric_sums import MetricsLog, MetricSums
from dominie.training.settings import TrainSettings
from dominie.training.stage_sources import StageSource, layer_pairs, routed_teacher
from dominie.training.trainer import DistillationTrainer
from dominie.training.validation import Validation

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Trained:
    """What a stage came to."""

    steps: int
    supervised_tokens: int
    seconds: float
    parameters: int
    trainable_parameters: int
    token_shares: Mapping[str, float]


def train_stage(
    folder: Path,
    *,
    student: Model,
    tokenizer: Any,
    teachers: Mapping[str, Model],
    lessons: Sequence[StageSource],
    settings: TrainSettings,
    caches: Mapping[str, Teacher] | None = None,
    shared: SharedBase | None = None,
    callbacks: Sequence[TrainerCallback] = (),
) -> Trained:
    """Train, or go on from the newest whole checkpoint, and write `folder/model`.

    Args:
        folder: the stage's folder; `checkpoints/` and `metrics.jsonl` are made in it.
        student: who learns.
        tokenizer: the student's, with its chat template; saved beside the weights.
        teachers: by the names that `lessons` use.
        lessons: taught sources first, watched ones after.
        settings: the stage's `train`.
        caches: what speaks in the place of teachers, by the names that `lessons` use.
        shared: which teachers share the student's base, of `shared_base_of`; None finds it out.
        callbacks: progress displays.

    Raises:
        InputError: models that do not fit each other or the data.
        RunError: the loss ceased to be finite.
        Interrupted: a signal came, and a checkpoint was saved.
    """
    set_seed(settings.seed)
    taught = [lesson for lesson in lessons if lesson.share > 0]
    course = schedule_of(taught, settings)
    arguments = training_arguments(
        settings, folder / "checkpoints", steps=course.steps, ranks=init_distributed().num_processes
    )
    load_whole_models()
    model = load_student(
        student,
        lora=settings.lora,
        precision=settings.precision,
        gradient_checkpointing=settings.gradient_checkpointing,
    )
    check_head(model, where=student.path)
    own = model_flops(model)
    counts = [p.numel() for p in model.parameters()], [p.numel() for p in _trainable(model)]
    shared = shared or shared_base_of(student, teachers, settings)
    pack = any(spec.placed == "sharded" for spec in teachers.values())
    mesh = world_mesh() if pack else None
    loaded: dict[str, LocalTeacher] = {
        name: AdapterTeacher(model, shared.adapters[name])
        if name in shared.adapters
        else LocalTeacher(
            load_teacher(spec, tokenizer=tokenizer, device=arguments.device, mesh=mesh)
        )
        for name, spec in teachers.items()
    }
    stop = SaveAndStop()
    trained = trainer_of(
        model,
        loaded,
        folder=folder,
        arguments=arguments,
        course=course,
        lessons=lessons,
        settings=settings,
        own=own,
        caches=caches,
        callbacks=[stop, *callbacks],
    )
    with trained as trainer, stop.listening():
        trainer.resume(broadcast_from_main(lambda: _verified_checkpoint(folder / "checkpoints")))
    stop.check(where=f"stage {folder.name}, step {trainer.state.global_step}")
    result = Trained(
        steps=trainer.state.global_step,
        supervised_tokens=trainer.account.supervised_tokens,
        seconds=round(trainer.account.seconds, 1),
        parameters=sum(counts[0]),
        trainable_parameters=sum(counts[1]),
        token_shares=trainer.records.token_shares(),
    )
    save_model(trainer, folder / "model", tokenizer=tokenizer, settings=settings)
    load_whole_models()  # what stages after this one and evaluation load
    return result


def _verified_checkpoint(folder: Path) -> Path | None:
    """Where to go on from, saying which checkpoints cannot be used and why."""
    newest, skipped = newest_checkpoint(folder)
    for path, why in skipped.items():
        logger.warning("%s is passed over: %s", path, why)
    if skipped:
        logger.warning("going on from %s", newest.name if newest else "the start")
    return newest


def shared_base_of(
    student: Model, teachers: Mapping[str, Model], settings: TrainSettings
) -> SharedBase:
    """Find the teachers that share the student's base; none if its weights are sharded."""
    sharded = any(os.environ.get(f"ACCELERATE_USE_{kind}") for kind in ("FSDP", "DEEPSPEED"))
    sharded |= bool(settings.arguments.get("fsdp") or settings.arguments.get("deepspeed"))
    if settings.lora is None or not teachers:
        return SharedBase({}, {})
    return shared_base(
        describe(student),
        {name: describe(spec) for name, spec in teachers.items()},
        lora=settings.lora,
        precision=settings.precision,
        sharded=sharded,
    )


def _trainable(model: Any) -> list[Any]:
    return [p for p in model.parameters() if p.requires_grad]


@dataclass(frozen=True)
class Schedule:
    """How much a stage learns: conversations and share of each source, optimiser steps, epochs."""

    sizes: Mapping[str, int]
    shares: Mapping[str, float]
    steps: int
    epochs: float

    def mix(self, settings: TrainSettings, *, micro_batch: int) -> Mix:
        """The order in which the stage comes by its conversations."""
        return Mix(
            self.sizes,
            self.shares,
            batch=settings.batch,
            micro_batch=micro_batch,
            steps=self.steps,
            seed=settings.seed,
            mixing=settings.mixing,
        )


def schedule_of(taught: Sequence[StageSource], settings: TrainSettings) -> Schedule:
    """The course of a stage that teaches these lessons."""
    shares = {lesson.name: lesson.share for lesson in taught}
    sizes = {lesson.name: len(lesson.train) for lesson in taught}
    conversations = total_conversations(sizes, shares, settings.epochs)
    steps = settings.steps or max(1, round(conversations / settings.batch))
    return Schedule(sizes, shares, steps, steps * settings.batch / conversations * settings.epochs)


@contextlib.contextmanager
def trainer_of(
    model: Any,
    teachers: Mapping[str, LocalTeacher],
    *,
    folder: Path,
    arguments: TrainingArguments,
    course: Schedule,
    lessons: Sequence[StageSource],
    settings: TrainSettings,
    own: ModelFlops,
    caches: Mapping[str, Teacher] | None = None,
    teacher: Teacher | None = None,
    callbacks: Sequence[TrainerCallback] = (),
) -> Iterator[DistillationTrainer]:
    """The trainer of a stage; within, the student's forward pass returns its losses.

    Args:
        model: the student.
        teachers: that are in memory, by the names that `lessons` use.
        folder: the stage's folder.
        arguments: of transformers.
        course: how much is learnt.
        lessons: taught sources first, watched ones after.
        settings: the stage's `train`.
        own: what the student's FLOPs follow from.
        caches: what speaks in the place of teachers, by the names that `lessons` use.
        teacher: who speaks on every batch in place of them all.
        callbacks: progress displays and the like.
    """
    taught = [lesson for lesson in lessons if lesson.share > 0]
    models = {name: info_of(text_config(each.model)) for name, each in teachers.items()}
    pairs, options = layer_pairs(info_of(text_config(model)), models, taught)
    objective = Objective([lesson.terms for lesson in lessons])
    records = MetricsLog(folder / "metrics.jsonl")
    flops = {name: each.flops() for name, each in teachers.items()}
    utilisation = FlopsMeter(
        own,
        [flops.get(lesson.speaker or "") for lesson in lessons],
        peak=peak_flops(settings.precision),
    )
    with loss_in_forward(model, objective, pairs, options=options):
        yield _trainer(
            model,
            arguments,
            course,
            lessons,
            settings,
            teacher=teacher or routed_teacher(teachers, lessons, pairs, caches or {}),
            records=records,
            utilisation=utilisation,
            callbacks=callbacks,
        )


def _trainer(
    model: Any,
    arguments: TrainingArguments,
    course: Schedule,
    lessons: Sequence[StageSource],
    settings: TrainSettings,
    *,
    teacher: Teacher | None,
    records: MetricsLog,
    utilisation: FlopsMeter,
    callbacks: Sequence[TrainerCallback],
) -> DistillationTrainer:
    """The trainer, with its rows in order and its validation splits."""
    names = [lesson.name for lesson in lessons]
    routes = list(dict.fromkeys(lesson.speaker for lesson in lessons))
    collator = Collator(
        [routes.index(lesson.speaker) for lesson in lessons],
        settings.max_length if settings.packing else None,
    )
    validation = Validation(
        [lesson.validation for lesson in lessons],
        sources=names,
        shares=course.shares,
        collator=collator,
        teacher=teacher,
        batch=max(arguments.per_device_train_batch_size, 8),
    )
    watched = any(len(lesson.validation) for lesson in lessons)
    early = [EarlyStoppingCallback(settings.patience)] if settings.patience and watched else []
    weighed = {t for lesson in lessons if lesson.share for t in TERMS if lesson.terms.weighs(t)}
    return DistillationTrainer(
        model,
        arguments,
        rows=MixedRows([lesson.train for lesson in lessons]),
        mix=course.mix(settings, micro_batch=arguments.per_device_train_batch_size),
        collator=collator,
        teacher=teacher,
        meter=MetricSums(names, weighed),
        validation=validation if watched else None,
        records=records,
        utilisation=utilisation,
        epochs=course.epochs,
        micro_batches_ahead=settings.micro_batches_ahead(init_distributed().num_processes),
        source_gradients=settings.source_gradients,
        max_spike=settings.max_spike,
        callbacks=[*early, *callbacks],
    )


def save_model(
    trainer: DistillationTrainer, folder: Path, *, tokenizer: Any, settings: TrainSettings
) -> None:
    """Write what was trained as an ordinary Hugging Face folder, in the precision of the run."""
    accelerator = trainer.accelerator
    state = accelerator.get_state_dict(trainer.model_wrapped)
    model = accelerator.unwrap_model(trainer.model_wrapped)
    dtype = DTYPES[settings.precision]
    if settings.lora is not None and settings.lora.merge:
        model, state = merged(model)
    if trainer.is_world_process_zero():
        scratch = folder.with_name(f".writing-{folder.name}")
        shutil.rmtree(scratch, ignore_errors=True)
        # Gathered from shards, tied weights are two tensors; they are written once.
        tied = getattr(model, "all_tied_weights_keys", {})
        state = {
            name: tensor.to(dtype) if tensor.is_floating_point() else tensor
            for name, tensor in state.items()
            if tied.get(name) not in state
        }
        broken = [name for name, tensor in state.items() if not tensor.isfinite().all()]
        if broken:
            raise RunError(
                "the trained weights are not finite; the model is not written",
                where=f"stage {folder.parent.name}",
                found=", ".join(broken[:3]),
                do="lower the learning rate; in fp16, use bf16 or fp32",
            )
        with writing(scratch):
            model.save_pretrained(scratch, state_dict=state)
            if settings.lora is None or settings.lora.merge:
                model.config.dtype = dtype
                model.config.save_pretrained(scratch)
            tokenizer.save_pretrained(scratch)
            prepare_export(scratch, tokenizer)
            publish(scratch, folder)
    accelerator.wait_for_everyone()
