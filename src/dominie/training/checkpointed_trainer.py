"""transformers.Trainer with checkpoints that are whole or not there, and hold no pickle."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn
from transformers import Trainer

from dominie.models.head import causal_lm
from dominie.models.loading import restore_weights
from dominie.training.checkpoints import (
    drop_old,
    has_state,
    publish,
    random_states,
    read_state,
    restore_random_states,
    seal,
    write_state,
    writing,
)

logger = logging.getLogger(__name__)

#: Checkpoints a stage keeps while it trains; the best one is kept beside them.
KEPT_CHECKPOINTS = 2


class CheckpointedTrainer(Trainer):
    """Saves and restores a stage: weights, optimiser, schedule, loss scale, random states.

    Everything that transformers would pickle is written as tensors and JSON, except where an
    engine (FSDP, DeepSpeed) has a format of its own.
    """

    #: Files of the stage that a checkpoint keeps a copy of, as they are when it is written.
    copied: Sequence[Path] = ()

    _scratch: Path | None = None  # set while a checkpoint is being written

    # Whole or not there ----------------------------------------------------------------------

    def _get_output_dir(self, trial: Any) -> str:
        return str(self._scratch or super()._get_output_dir(trial))

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Have transformers write to a scratch folder, and name it when it is whole."""
        folder = Path(self.args.output_dir)
        name = f"checkpoint-{self.state.global_step}"
        scratch = self._scratch = folder / ".writing"
        with writing(scratch):
            super()._save_checkpoint(model, trial)
            self._scratch = None
            self.accelerator.wait_for_everyone()
            if self.state.best_global_step:
                self.state.best_model_checkpoint = str(
                    folder / f"checkpoint-{self.state.best_global_step}"
                )
            if self.args.should_save:
                self.state.save_to_json(str(scratch / name / "trainer_state.json"))
                (scratch / name / "training_args.bin").unlink(missing_ok=True)  # never read
                for file in self.copied:
                    if file.exists():
                        shutil.copyfile(file, scratch / name / file.name)
                seal(scratch / name)
                publish(scratch / name, folder / name)
        if self.args.should_save:
            best = self.state.best_model_checkpoint
            drop_old(folder, keep=KEPT_CHECKPOINTS, spare=Path(best) if best else None)
        self.accelerator.wait_for_everyone()

    def drop_half_written(self) -> None:
        """Remove what a run that was killed while it saved has left."""
        if self.args.should_save:
            shutil.rmtree(Path(self.args.output_dir) / ".writing", ignore_errors=True)

    # Weights ---------------------------------------------------------------------------------

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """Restore by way of `from_pretrained`.

        transformers takes a checkpoint's names as they stand, does not find a mixture's experts
        among them, and goes on with those the model has.
        """
        if self._plain:
            restore_weights(self.model, resume_from_checkpoint)
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_best_model(self) -> None:
        if self._plain:
            restore_weights(self.model, str(self.state.best_model_checkpoint))
        else:
            super()._load_best_model()

    @property
    def _plain(self) -> bool:
        """Whether the student is whole on this rank and has no adapters."""
        return not self._sharded and causal_lm(self.model) is self.model

    @property
    def _sharded(self) -> bool:
        """Whether an engine holds the states of this rank in a format of its own."""
        return bool(self.is_fsdp_enabled or self.is_deepspeed_enabled)

    # States ----------------------------------------------------------------------------------

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if self._sharded:
            super()._save_optimizer_and_scheduler(output_dir)
        elif self.args.should_save:
            write_state(Path(output_dir) / "optimizer", self.optimizer.state_dict())
            write_state(Path(output_dir) / "scheduler", self.lr_scheduler.state_dict())

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if self._sharded:
            if self.is_deepspeed_enabled and checkpoint is not None:
                logger.warning(
                    "DeepSpeed unpickles its optimiser state, which runs whatever is in it: the "
                    "files are those that the manifest names, but go on from your own alone"
                )
            super()._load_optimizer_and_scheduler(checkpoint)
        elif checkpoint is not None:
            optimizer = read_state(Path(checkpoint) / "optimizer", device=self.args.device)
            self.optimizer.load_state_dict(optimizer)
            self.lr_scheduler.load_state_dict(read_state(Path(checkpoint) / "scheduler"))

    def _save_scaler(self, output_dir: str) -> None:
        scaler = getattr(self.accelerator, "scaler", None)
        if scaler is not None and self.args.should_save:
            write_state(Path(output_dir) / "scaler", scaler.state_dict())

    def _load_scaler(self, checkpoint: str | None) -> None:
        scaler = getattr(self.accelerator, "scaler", None)
        if scaler is not None and checkpoint and has_state(Path(checkpoint) / "scaler"):
            scaler.load_state_dict(read_state(Path(checkpoint) / "scaler"))

    def _save_rng_state(self, output_dir: str) -> None:
        write_state(self._random(output_dir), random_states())

    def _load_rng_state(self, checkpoint: str | None) -> None:
        # Of a rank that was not there before: it goes on from its seed.
        if checkpoint is not None and has_state(self._random(checkpoint)):
            restore_random_states(read_state(self._random(checkpoint)))

    def _random(self, folder: str) -> Path:
        return Path(folder) / f"random-{self.args.process_index}"
