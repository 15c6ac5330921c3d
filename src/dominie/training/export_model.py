"""Writes what a stage has trained as an ordinary Hugging Face folder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from dominie.core.errors import RunError
from dominie.core.io import empty_folder
from dominie.core.whole_folders import publish, writing
from dominie.models.adapters import merged
from dominie.models.loading import DTYPES
from dominie.models.model_folder import base_and_adapter, write_base
from dominie.models.weights import prepare_export
from dominie.training.settings import TrainSettings

if TYPE_CHECKING:
    from dominie.training.train_stage import StageModels
    from dominie.training.trainer import DistillationTrainer


def save_model(
    trainer: DistillationTrainer,
    folder: Path,
    models: StageModels,
    settings: TrainSettings,
    ends: Sequence[int],
) -> None:
    """Write what was trained as an ordinary Hugging Face folder, in the precision of the run.

    Args:
        ends: tokens that end an answer.
    """
    student, tokenizer = models.student, models.tokenizer
    accelerator = trainer.accelerator
    state = accelerator.get_state_dict(trainer.model_wrapped)
    model = accelerator.unwrap_model(trainer.model_wrapped)
    dtype = DTYPES[settings.precision]
    if settings.lora is not None and settings.lora.merge:
        model, state = merged(model)
    if trainer.is_world_process_zero():
        scratch = folder.with_name(f".writing-{folder.name}")
        empty_folder(scratch)
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
            else:
                write_base(scratch, base_and_adapter(student)[0])
            tokenizer.save_pretrained(scratch)
            prepare_export(scratch, tokenizer, ends)
            publish(scratch, folder)
    accelerator.wait_for_everyone()
