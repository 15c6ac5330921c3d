"""From a recipe's `train` to transformers.TrainingArguments."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments

from dominie.errors import InputError
from dominie.training.settings import TrainSettings
from dominie.training.trackers import shown_as

#: What the paper trains with, where a recipe says nothing.
_DEFAULTS: dict[str, Any] = {
    "lr_scheduler_type": "cosine",
    "warmup_steps": 0.1,
    "report_to": "none",
}

#: transformers renamed it on the way to version 6.
_CHECKPOINTING = (
    "activation_checkpointing"
    if "activation_checkpointing" in {f.name for f in dataclasses.fields(TrainingArguments)}
    else "gradient_checkpointing"
)


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
    micro_batch = settings.conversations_per_forward(ranks)
    every = max(1, settings.evaluate_every or steps // 10)
    best = settings.validation_decides
    options: dict[str, Any] = {
        **_DEFAULTS,
        "use_cpu": not torch.accelerator.is_available(),  # bf16 on a CPU has to be asked for
        **shown_as(folder),
        **settings.arguments,
        "output_dir": str(folder),
        "learning_rate": settings.learning_rate,
        "max_steps": steps,
        "per_device_train_batch_size": micro_batch,
        "per_device_eval_batch_size": micro_batch,
        "gradient_accumulation_steps": settings.batch // ranks // micro_batch,
        "bf16": settings.precision == "bf16",
        "fp16": settings.precision == "fp16",
        _CHECKPOINTING: settings.gradient_checkpointing,
        f"{_CHECKPOINTING}_kwargs": {"use_reentrant": False},
        "seed": settings.seed,
        "logging_steps": settings.log_every or max(1, steps // 100),
        "logging_first_step": True,
        "logging_nan_inf_filter": False,
        "eval_strategy": "steps",
        "eval_steps": every,
        "save_strategy": "steps",
        "save_steps": every if best else max(1, settings.checkpoint_every or steps // 10),
        "load_best_model_at_end": best,
        "metric_for_best_model": "loss" if best else None,
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


def load_whole_models() -> None:
    """From here on, have transformers load models whole, on every process.

    Once it knows of ZeRO-3 it cuts every model it loads. The student is to be read and checked
    before it is the engine's, and teachers never are.
    """
    from transformers.integrations import unset_hf_deepspeed_config

    unset_hf_deepspeed_config()
