"""Makes transformers.TrainingArguments of a recipe's `train`, and sets up trackers."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, TrainingArguments

from dominie.core.errors import InputError
from dominie.training.settings import TrainSettings

#: Fields of TrainingArguments that say where metrics are shown, and change nothing that is learnt.
SHOWN = (
    "report_to",
    "run_name",
    "project",
    "trackio_space_id",
    "trackio_bucket_id",
    "trackio_static_space_id",
)


def shown_as(folder: Path) -> dict[str, Any]:
    """How a stage is called there, unless the recipe says: its recipe's project, its own run.

    Args:
        folder: of the stage's checkpoints.
    """
    stage = folder.parent
    return {"project": stage.parent.name, "run_name": f"{stage.parent.name}/{stage.name}"}


class OneRunAStage(TrainerCallback):
    """Lets the next stage begin a run of its own: W&B would go on in that of the stage before."""

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Close W&B's run, which its own callback leaves open."""
        wandb = sys.modules.get("wandb")
        if "wandb" in args.report_to and wandb is not None and wandb.run is not None:
            wandb.finish()


def keep_tensorboard(callbacks: list[TrainerCallback], folder: Path) -> None:
    """Have TensorBoard write beside `metrics.jsonl`, unless its own variable says elsewhere.

    It would write among the checkpoints, which go when the stage is done.

    Args:
        callbacks: of a trainer.
        folder: of the stage.
    """
    for callback in callbacks:
        if type(callback).__name__ == "TensorBoardCallback" and callback.logging_dir is None:
            callback.logging_dir = str(folder / "tensorboard")


def rewind_tensorboard(callbacks: list[TrainerCallback], step: int) -> None:
    """Have TensorBoard forget what it was told beyond a step: from there on it is done again.

    Args:
        callbacks: of a trainer whose first process this is, before it trains.
        step: of the checkpoint that training goes on from; 0 without one.
    """
    for callback in callbacks:
        place = getattr(callback, "logging_dir", None)
        if type(callback).__name__ == "TensorBoardCallback" and place and Path(place).is_dir():
            from torch.utils.tensorboard import SummaryWriter

            callback.tb_writer = SummaryWriter(place, purge_step=step + 1)


def flat(means: dict[str, Any]) -> dict[str, float]:
    """The nested means of a line of metrics under names that trackers take.

    Of a mixture of experts: the mean entropy of its routers, and the smallest share of the routing
    weight that any expert of any layer has; `metrics.jsonl` has them all.
    """
    found = {f"term_{name}": value for name, value in means["terms"].items()}
    for source, values in means["sources"].items():
        found |= {f"{source}_{name}": value for name, value in values.items()}
    if router := means.get("router"):
        found["router_entropy"] = sum(router["entropy"]) / len(router["entropy"])
        found["router_least_load"] = min(min(layer) for layer in router["load"])
    return found


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
