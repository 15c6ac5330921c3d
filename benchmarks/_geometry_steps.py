"""Optimiser steps of a stage's own trainer, timed one by one."""

from __future__ import annotations

import contextlib
import json
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from _memory import is_too_large, peak_above, released, settled
from _results import GPU
from transformers import TrainerCallback

from dominie.models.attention_hooks import hooks_of
from dominie.models.info import model_flops
from dominie.teachers import LocalTeacher
from dominie.training.settings import TrainSettings, training_arguments
from dominie.training.stage_sources import StageTraining
from dominie.training.train_stage import LoadedModels, build_trainer

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from contextlib import AbstractContextManager

    from _results import Deadline

    from dominie.teachers import Teacher
    from dominie.training.stage_sources import StageSource

_NEVER = 10_000  # more steps than are taken: nothing is logged, saved or evaluated in between


@dataclass(frozen=True)
class Steps:
    """What steps came to.

    Attributes:
        seconds: of a step, the median without the first, which warms up.
        peak: bytes above the models at most; None where the system does not say.
        standing: bytes of the models, on a GPU.
        micro_batch: conversations of a forward pass.
        taken: steps that were timed.
        loss: of the first step, a mean in nats per supervised token.
    """

    seconds: float
    peak: int | None
    standing: int | None
    micro_batch: int
    taken: int
    loss: float


class _Clock(TrainerCallback):
    """Notes when steps end, and ends the training after so many or at a time."""

    def __init__(self, steps: int, deadline: Deadline) -> None:
        self.steps, self.deadline, self.at = steps, deadline, [0.0]

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == 0:
            self.at = [_now()]

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.at.append(_now())
        late = self.deadline.passed and len(self.at) > 2
        control.should_training_stop = late or len(self.at) > self.steps + 1

    @property
    def seconds(self) -> list[float]:
        """Of each step but the first, which compiles and fills caches."""
        return [b - a for a, b in zip(self.at[1:], self.at[2:], strict=False)]


@dataclass(frozen=True)
class TeacherSetup:
    """How a stage is taught.

    Attributes:
        sources: with their rows, losses and the names of their teachers.
        teachers: models, by the names that `sources` use.
        caches: what speaks in their place.
        plainly: in place of the product's losses and teachers, where that is asked for: makes the
            student return others, and the teacher that goes with them.
    """

    sources: Sequence[StageSource]
    teachers: Mapping[str, Any]
    caches: Mapping[str, Teacher]
    plainly: tuple[Callable[[], AbstractContextManager[None]], Any] | None = None


def steps_taken(
    student: Any, taught: TeacherSetup, *, length: int, batch: int, micro_batch: int, steps: int,
    deadline: Deadline, fused: bool = False,
) -> Steps:  # fmt: skip
    """Train for a few steps as a stage does, optimiser and all.

    Args:
        student: who learns; its weights change.
        taught: by whom and how.
        length: of a row of tokens.
        batch: conversations of an optimiser step.
        micro_batch: of a forward pass.
        steps: to be timed, beside the first.
        deadline: after which no further step is begun.
        fused: whether the student is given Liger's layers, which it keeps.

    Raises:
        Exception: it does not fit, or fails in another way.
    """
    settings = TrainSettings(
        batch=batch, micro_batch=micro_batch, steps=_NEVER, max_length=length, precision="bf16",
        log_every=_NEVER - 1, checkpoint_every=_NEVER - 1, evaluate_every=_NEVER - 1,
        arguments={"use_liger_kernel": True} if fused else {},
    )  # fmt: skip
    clock = _Clock(steps, deadline)
    before = settled()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        stage = StageTraining(folder=folder, sources=taught.sources, settings=settings)
        arguments = training_arguments(settings, folder / "checkpoints", steps=_NEVER, ranks=1)
        models = LoadedModels(
            student=student,
            flops=model_flops(student),
            teachers={name: LocalTeacher(model) for name, model in taught.teachers.items()},
            caches=taught.caches,
        )
        try:
            with contextlib.ExitStack() as stack:
                loss_in_forward, teacher = taught.plainly or (contextlib.nullcontext, None)
                trainer = stack.enter_context(
                    build_trainer(stage, models, arguments, teacher=teacher, callbacks=[clock])
                )
                stack.enter_context(loss_in_forward())
                trainer.resume(None)
            peak = peak_above(before)
            first = json.loads((folder / "metrics.jsonl").read_text().splitlines()[0])
        finally:
            student.zero_grad(set_to_none=True)
            for model in taught.teachers.values():
                for listener in hooks_of(model):
                    listener.detach()  # type: ignore[attr-defined]
    return Steps(
        seconds=statistics.median(clock.seconds),
        peak=peak,
        standing=before if GPU else None,
        micro_batch=micro_batch,
        taken=len(clock.seconds),
        loss=first["loss"],
    )


def fitting_steps(
    student: Any, taught: TeacherSetup, *, micro_batch: int, **options: Any
) -> tuple[Steps | None, list[int]]:
    """Steps of the largest micro-batch that fits, halved from one to the next; which did not.

    Raises:
        Exception: a failure that is not of memory.
    """
    too_large: list[int] = []
    while micro_batch:
        try:
            return steps_taken(student, taught, micro_batch=micro_batch, **options), too_large
        except Exception as error:
            if not is_too_large(error):
                raise
            too_large.append(micro_batch)
        student.zero_grad(set_to_none=True)  # outside of the handler, whose traceback holds tensors
        released()
        micro_batch //= 2
    return None, too_large


def _now() -> float:
    if GPU:
        torch.cuda.synchronize()
    return time.perf_counter()
