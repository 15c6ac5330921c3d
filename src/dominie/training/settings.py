"""The settings of `train` in a recipe, and the transformers.TrainingArguments made of them."""

from __future__ import annotations

import dataclasses
import math
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from dominie.core.errors import InputError
from dominie.training.stop_at import StopAt

if TYPE_CHECKING:
    from transformers import TrainingArguments

#: What a source is given at a time: a conversation, a micro-batch of them or an optimiser step.
Mixing = Literal["conversations", "micro_batches", "steps"]


@dataclass(frozen=True, kw_only=True)
class Balance:
    """What the shares of a stage's sources are shares of.

    Attributes:
        by: `tokens`: the tokens of a source weigh together as much as its share says, in every
            optimiser step that has any. `conversations`: every supervised token weighs 1, so that
            a source of short answers has less of the loss than its share of conversations.
        gap: α, 1 to begin with: an expert's source weighs (m / mean of m)^α times as much, from
            0.05 to 20, where m is its running mean divergence per token; their sum stays, and so
            does the weight of a source whose teacher is what the student starts as. None follows
            no gap.
        cap: the largest weight of a token; what a source does not get for it, the others get.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid", "strict": True}
    by: Literal["conversations", "tokens"] = "tokens"
    gap: float | None = None
    cap: float = 20.0

    def __post_init__(self) -> None:
        if self.gap is not None and not 0.0 < self.gap <= 10.0:
            raise ValueError(f"gap must be above 0 and at most 10, got {self.gap}")
        if not 1.0 <= self.cap < math.inf:
            raise ValueError(f"cap must be finite and at least 1, got {self.cap}")
        if self.by != "tokens" and (self.gap is not None or self.cap != Balance.cap):
            raise ValueError("gap and cap are of balance by tokens: add by: tokens")


@dataclass(frozen=True, kw_only=True)
class Lora:
    """Low-rank adapters (peft).

    Attributes:
        r: rank.
        alpha: the adapter's output is scaled by alpha / r.
        dropout: on the adapter's input.
        target_modules: which modules get one: names, or `all-linear`.
        modules_to_save: modules trained in full beside the adapters.
        merge: whether `model/` is written with the adapters added to the weights, or holds the
            adapter alone.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid", "strict": True}
    r: int = 16
    alpha: float = 32
    dropout: float = 0.0
    target_modules: str | list[str] = "all-linear"
    modules_to_save: list[str] | None = None
    merge: bool = True

    def __post_init__(self) -> None:
        if not 1 <= self.r <= 2**16:
            raise ValueError(f"r must be from 1 to 65536, got {self.r}")
        if not 0 < self.alpha < float("inf"):
            raise ValueError(f"alpha must be positive and finite, got {self.alpha}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be from 0 to below 1, got {self.dropout}")
        if not self.target_modules:
            raise ValueError("target_modules names no module")


_RANGES = {
    "batch": (1, 2**20),
    "micro_batch": (1, 2**20),
    "teacher_micro_batch": (1, 2**20),
    "max_length": (2, 2**24),
    "steps": (1, 10**9),
    "log_every": (1, 10**9),
    "evaluate_every": (1, 10**9),
    "checkpoint_every": (1, 10**9),
    "patience": (1, 10**9),
    "evaluate_rows": (0, 10**9),
    "learning_rate": (0, 1e12),
    "seed": (0, 2**32 - 1),
}


@dataclass(frozen=True, kw_only=True)
class TrainSettings:
    """Settings of a stage's training; defaults are the paper's where it gives one.

    Attributes:
        learning_rate: peak of the schedule.
        epochs: passes over the largest source of the mix.
        steps: optimiser steps instead of `epochs`.
        batch: conversations per optimiser step, over all ranks and accumulated micro-batches.
        micro_batch: conversations per forward pass of one rank, on average: a step's are laid out
            together, and none of its passes is larger than so many rows of `max_length`.
        teacher_micro_batch: conversations per forward pass of a teacher, a multiple of
            `micro_batch`: pays where its weights are moved for each (placement `cpu`, `sharded`);
            None is as many as the student's.
        max_length: tokens of the longest conversation, and of a packed row.
        mixing: what sources take turns by: `conversations` mixes them in every optimiser step,
            `micro_batches` gives each forward passes of its own, `steps` each a whole step.
        balance: what a source's share is a share of: `tokens`, the loss, whatever the lengths of
            its answers; or the `conversations` that are read.
        precision: dtype of the forward pass; trainable weights and the optimiser stay fp32.
        packing: several conversations to a row (block-diagonal attention, restarted positions).
        seed: of initialisation, order and dropout.
        gradient_checkpointing: recompute activations in backward (non-reentrant).
        lora: train low-rank adapters instead of all weights.
        source_gradients: measure the norm of each source's gradient on logged steps, which costs
            one more forward and backward pass for each source (none where `mixing` is by `steps`).
        max_spike: stop, before the step is taken, where its loss is more than so many times the
            median of the last hundred; None takes every finite one.
        log_every: optimiser steps between lines of metrics.
        evaluate_every: optimiser steps between evaluations on the validation splits; None
            evaluates ten times a run, or as often as a tenth of its time allows.
        evaluate_rows: conversations of each source's validation split that are used.
        forgetting: measure with each evaluation how far the student has moved from what it began
            as, by KL on each source's validation split.
        checkpoint_every: optimiser steps between checkpoints; None writes at most ten, likewise.
        keep: the model of the `last` step, or the `best` on validation.
        patience: evaluations without a better validation loss before the stage stops early.
        stop_at: what else ends the stage early, and keeps the last model before it.
        arguments: every other field of transformers.TrainingArguments, as given.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid", "strict": True}
    learning_rate: float = 2e-5
    epochs: float = 2
    steps: int | None = None
    batch: int = 256
    micro_batch: int | None = None
    teacher_micro_batch: int | None = None
    max_length: int = 2048
    mixing: Mixing = "conversations"
    balance: Balance = field(default_factory=Balance)
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    packing: bool = True
    seed: int = 0
    gradient_checkpointing: bool = False
    lora: Lora | None = None
    source_gradients: bool = False
    max_spike: float | None = None
    log_every: int | None = None
    evaluate_every: int | None = None
    evaluate_rows: int = 256
    forgetting: bool = False
    checkpoint_every: int | None = None
    keep: Literal["last", "best"] = "last"
    patience: int | None = None
    stop_at: StopAt | None = None
    arguments: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, (least, most) in _RANGES.items():
            value = getattr(self, name)
            if value is not None and not least <= value <= most:
                raise ValueError(f"{name} must be from {least} to {most}, got {value}")
        if not 0 < self.epochs <= 10**6:
            raise ValueError(f"epochs must be positive and at most 1000000, got {self.epochs}")
        if self.micro_batch and self.batch % self.micro_batch:
            raise ValueError(f"micro_batch {self.micro_batch} must divide batch {self.batch}")
        if self.max_spike is not None and not 1 < self.max_spike < float("inf"):
            raise ValueError(f"max_spike is a finite factor above 1, got {self.max_spike}")
        if self.source_gradients and self.precision == "fp16":
            raise ValueError("source_gradients cannot be measured under fp16's loss scaling")

    def micro_batches_ahead(self, ranks: int) -> int:
        """Micro-batches of the student in a forward pass of its teachers.

        Raises:
            InputError: `teacher_micro_batch` is not made of whole micro-batches.
        """
        micro_batch = self.conversations_per_forward(ranks)
        if self.teacher_micro_batch is None:
            return 1
        if self.teacher_micro_batch % micro_batch:
            raise InputError(
                "a teacher reads whole micro-batches of the student",
                where="train.teacher_micro_batch",
                expected=f"a multiple of the {micro_batch} of micro_batch",
                found=str(self.teacher_micro_batch),
                do="change train.teacher_micro_batch or train.micro_batch",
            )
        return self.teacher_micro_batch // micro_batch

    def balances(self, sources: int) -> bool:
        """Whether the shares of so many sources are of the loss, and would not be in any case.

        A step of one source has that source's mean as its loss, whatever its tokens weigh.
        """
        return self.balance.by == "tokens" and sources > 1 and self.mixing != "steps"

    @property
    def loss_decides(self) -> bool:
        """Whether a stage ends with the weights of the lowest validation loss."""
        return self.keep == "best" or self.patience is not None

    @property
    def validation_decides(self) -> bool:
        """Whether validation decides which weights a stage ends with."""
        return self.loss_decides or self.stop_at is not None

    @property
    def measures_forgetting(self) -> bool:
        """Whether validation measures how far the student has moved from what it began as."""
        return self.forgetting or self.stop_at is not None

    def conversations_per_forward(self, ranks: int) -> int:
        """Conversations in a forward pass of one rank: `micro_batch`, else a divisor up to 8.

        Raises:
            InputError: `batch` cannot be shared out over `ranks` in equal micro-batches.
        """
        if self.batch % ranks:
            raise InputError(
                "the batch cannot be shared out over the ranks",
                where="train.batch",
                expected=f"a multiple of {ranks} ranks",
                found=str(self.batch),
                do="set train.batch to a multiple of the number of processes",
            )
        share = self.batch // ranks
        if self.micro_batch is None:
            return max(n for n in range(1, min(share, 8) + 1) if share % n == 0)
        if share % self.micro_batch:
            raise InputError(
                "micro-batches do not fill the batch",
                where="train.micro_batch",
                expected=f"a divisor of {share}, the batch of {self.batch} over {ranks} ranks",
                found=str(self.micro_batch),
                do="change train.batch or train.micro_batch",
            )
        return self.micro_batch


def shown_as(folder: Path) -> dict[str, Any]:
    """How a stage is called there, unless the recipe says: its recipe's project, its own run.

    Args:
        folder: of the stage's checkpoints.
    """
    stage = folder.parent
    return {"project": stage.parent.name, "run_name": f"{stage.parent.name}/{stage.name}"}


def training_arguments(
    settings: TrainSettings, folder: Path, *, steps: int, ranks: int
) -> TrainingArguments:
    """Everything transformers.Trainer needs to know.

    Args:
        settings: the stage's `train`.
        folder: where checkpoints go.
        steps: optimiser steps of the stage.
        ranks: processes that share the batch.

    Raises:
        InputError: TrainingArguments refuses a value.
    """
    import torch
    from transformers import TrainingArguments

    checkpointing = (  # transformers renamed it on the way to version 6
        "activation_checkpointing"
        if "activation_checkpointing" in {f.name for f in dataclasses.fields(TrainingArguments)}
        else "gradient_checkpointing"
    )
    micro_batch = settings.conversations_per_forward(ranks)
    every = max(1, settings.evaluate_every or steps // 10)
    best = settings.validation_decides
    hints = typing.get_type_hints(TrainingArguments)
    given = {  # torch takes no whole number for a beta
        key: float(value) if hints[key] is float else value
        for key, value in settings.arguments.items()
    }
    options: dict[str, Any] = {
        "lr_scheduler_type": "cosine",  # as in the paper
        "warmup_steps": 0.1,
        "report_to": "none",
        "use_cpu": not torch.accelerator.is_available(),  # bf16 on a CPU has to be asked for
        # From pinned memory batches are copied to a GPU in their turn: it is not waited for.
        "accelerator_config": {"non_blocking": given.get("dataloader_pin_memory", True)},
        **shown_as(folder),
        **given,
        "output_dir": str(folder),
        "learning_rate": settings.learning_rate,
        "max_steps": steps,
        "per_device_train_batch_size": micro_batch,
        "per_device_eval_batch_size": micro_batch,
        "gradient_accumulation_steps": settings.batch // ranks // micro_batch,
        "bf16": settings.precision == "bf16",
        "fp16": settings.precision == "fp16",
        checkpointing: settings.gradient_checkpointing,
        f"{checkpointing}_kwargs": {"use_reentrant": False},
        "seed": settings.seed,
        "logging_steps": settings.log_every or max(1, steps // 100),
        "logging_first_step": True,
        "logging_nan_inf_filter": False,
        "eval_strategy": "steps",
        "eval_steps": every,
        "save_strategy": "steps",
        "save_steps": every if best else max(1, settings.checkpoint_every or steps // 10),
        "load_best_model_at_end": best,
        "metric_for_best_model": ("choice" if settings.stop_at else "loss") if best else None,
        "greater_is_better": False if best else None,
        "remove_unused_columns": False,
        "disable_tqdm": True,
        "average_tokens_across_devices": True,
    }
    try:
        return TrainingArguments(**options)
    except (ValueError, TypeError, ImportError) as error:
        raise InputError(
            "transformers refuses the settings", where="train", found=str(error)
        ) from None
