"""transformers.Trainer with checkpoints that are whole or not there."""

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
from dominie.training.checkpoints import drop_old, publish, seal, writing

logger = logging.getLogger(__name__)

#: Checkpoints a stage keeps while it trains; the best one is kept beside them.
KEPT_CHECKPOINTS = 2


class CheckpointedTrainer(Trainer):
    """Saves and restores a stage: weights, optimiser, schedule, loss scale, random states.

    The files are transformers' own, in a folder that is sealed by a manifest of their SHA-256. What
    `torch.save` wrote is read with `weights_only=True`, which builds tensors and plain values and
    runs no code; only DeepSpeed unpickles its own files.
    """

    #: Files of the stage that a checkpoint keeps a copy of, as they are when it is written.
    copied: Sequence[Path] = ()

    # Whole or not there ----------------------------------------------------------------------

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Have transformers write to a scratch folder, and name it when it is whole."""
        folder = Path(self.args.output_dir)
        name = f"checkpoint-{self.state.global_step}"
        scratch = folder / ".writing"
        with writing(scratch):
            self.args.output_dir = str(scratch)
            try:
                super()._save_checkpoint(model, trial)
            finally:
                self.args.output_dir = str(folder)
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

    def warn_of_pickles(self) -> None:
        """Say so if states are restored by running what is in their files."""
        if self.is_deepspeed_enabled:
            logger.warning(
                "DeepSpeed unpickles its optimiser state, which runs whatever is in it: the files "
                "are those that the manifest names, but go on from your own alone"
            )

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
        sharded = self.is_fsdp_enabled or self.is_deepspeed_enabled
        return not sharded and causal_lm(self.model) is self.model
