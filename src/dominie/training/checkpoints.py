"""Checkpoints that are either whole or not there: sealed, verified, rotated."""

from __future__ import annotations

import json
import logging
import re
import shutil
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import nn
from transformers import Trainer
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME, TRAINER_STATE_NAME
from transformers.trainer_callback import ExportableState

from dominie.core.distributed import broadcast_from_main
from dominie.core.errors import RunError
from dominie.core.io import empty_folder, file_manifest, manifest_error, text
from dominie.core.run_reader import read_object
from dominie.core.whole_folders import HashedFiles, publish, writing
from dominie.models.head import causal_lm
from dominie.models.loading import restore_weights

_MANIFEST = "manifest.json"
_NAME = re.compile(r"checkpoint-(\d+)")
#: The optimiser's state as dominie wrote it before it kept transformers' own files.
_EARLIER = "optimizer.safetensors"


def seal(
    folder: Path,
    *,
    step: int | None = None,
    stage: str | None = None,
    files: Mapping[str, Any] | None = None,
) -> None:
    """Write down what the checkpoint consists of, so that a reader can tell whether it is whole.

    Args:
        folder: of the checkpoint.
        step: it was written at; its copy under another's name is told by it.
        stage: the fingerprint of the stage that is trained; one of another training is told by it.
        files: its manifest if that is known already; None reads and hashes all files.
    """
    manifest = {
        "step": step,
        "stage": stage,
        "files": file_manifest(folder) if files is None else files,
    }
    (folder / _MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")


def fault(folder: Path, *, hashes: bool = True) -> str | None:
    """What is wrong with a checkpoint: a file is not as it was written, or it is another one.

    Args:
        folder: of the checkpoint.
        hashes: whether contents are read, too.

    Returns:
        A phrase that names the file, None for a checkpoint that is as it was written.
    """
    try:
        manifest = json.loads((folder / _MANIFEST).read_text(encoding="utf-8"))
        files: dict[str, Any] = manifest["files"]
        if manifest.get("step") not in (None, _step(folder)):
            return f"it is a copy of checkpoint-{manifest['step']}"
        stage = _fingerprint(folder.parent)
        if stage and manifest.get("stage") not in (None, stage):
            return "it is of another training"
        if _EARLIER in files:
            return "an earlier version of dominie wrote it, whose optimiser state is not read"
        return manifest_error(folder, files, hashes=hashes)
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{_MANIFEST} cannot be read ({type(error).__name__})"


def _step(checkpoint: Path) -> int:
    match = _NAME.fullmatch(checkpoint.name)
    return int(match[1]) if match else 0


def _fingerprint(checkpoints: Path) -> str | None:
    """Of the stage that these checkpoints are of; None if it is not part of a run."""
    return text(read_object(checkpoints.parent / "stage.json", []).get("fingerprint"))


def newest_checkpoint(folder: Path) -> tuple[Path | None, dict[Path, str]]:
    """The latest checkpoint that is as it was written, and why later ones were passed over."""
    skipped: dict[Path, str] = {}
    for path in reversed(by_step(folder)):
        found = fault(path)
        if found is None:
            return path, skipped
        skipped[path] = found
    return None, skipped


def verified_checkpoint(folder: Path) -> Path | None:
    """The checkpoint to go on from; warns of those that cannot be used, with the reason.

    Raises:
        RunError: the best one so far is damaged.
    """
    newest, skipped = newest_checkpoint(folder)
    for path, why in skipped.items():
        logger.warning("%s is passed over: %s", path, why)
    if skipped:
        logger.warning("going on from %s", newest.name if newest else "the start")
    if newest is not None and (best := best_of(newest)) is not None:
        check_best(best)
    return newest


def best_of(checkpoint: Path) -> Path | None:
    """The best checkpoint so far when this one was written, None if no validation chooses one."""
    state = json.loads((checkpoint / TRAINER_STATE_NAME).read_text(encoding="utf-8"))
    step = state.get("best_global_step")
    return checkpoint.with_name(f"checkpoint-{step}") if step else None


def check_best(best: Path) -> None:
    """Refuse a best checkpoint that is not as it was written.

    Raises:
        RunError: names the file.
    """
    if (found := fault(best)) is not None:
        raise RunError(
            "the best checkpoint of the stage is damaged, whose weights it is to end with",
            where=str(best),
            found=found,
            do=f"put back a copy of it; or move {best.parent.parent} away to train the stage again",
        )


def drop_old(folder: Path, *, keep: int, spare: Path | None) -> None:
    """Delete all but the newest `keep` whole checkpoints, never `spare` (the best one).

    One that is broken does not count, so that the last whole one always stays.
    """
    newest_first = list(reversed(by_step(folder)))
    whole = [path for path in newest_first if fault(path, hashes=False) is None]
    for path in newest_first:
        if path not in whole[:keep] and path != spare and len(whole) >= keep:
            shutil.rmtree(path, ignore_errors=True)


def by_step(folder: Path) -> list[Path]:
    """The checkpoints in a folder, whole or not, the newest last."""
    if not folder.is_dir():
        return []
    return sorted(filter(lambda path: _NAME.fullmatch(path.name), folder.iterdir()), key=_step)


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
        with writing(scratch), HashedFiles(scratch / name) as self._hashed:
            if self.args.should_save:
                folder.mkdir(exist_ok=True)
                empty_folder(scratch)
            self.accelerator.wait_for_everyone()
            self.args.output_dir = str(scratch)
            try:
                super()._save_checkpoint(model, trial)
            finally:
                self.args.output_dir = str(folder)
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                self.state.best_model_checkpoint = None  # the step names it: folders are moved
                self.state.save_to_json(str(scratch / name / "trainer_state.json"))
                (scratch / name / "training_args.bin").unlink(missing_ok=True)  # never read
                for file in self.copied:
                    if file.exists():
                        shutil.copyfile(file, scratch / name / file.name)
                seal(
                    scratch / name,
                    step=self.state.global_step,
                    stage=_fingerprint(folder),
                    files=self._hashed.manifest(),
                )
                publish(scratch / name, folder / name)
        self._name_best()
        if self.args.should_save:
            best = self.state.best_model_checkpoint
            drop_old(folder, keep=KEPT_CHECKPOINTS, spare=Path(best) if best else None)
        self.accelerator.wait_for_everyone()

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        """Write the optimiser's state, and hash it and the weights meanwhile.

        The files are as transformers writes them, which hashes none.
        """
        if self.args.should_save:
            self._hashed.begin()
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            super()._save_optimizer_and_scheduler(output_dir)
        elif self.args.should_save:
            with self._hashed.stream(Path(output_dir, OPTIMIZER_NAME)) as file:
                torch.save(self.optimizer.state_dict(), file)  # type: ignore[arg-type]
            with warnings.catch_warnings():  # of a schedule that is saved without its optimiser
                warnings.simplefilter("ignore")
                torch.save(self.lr_scheduler.state_dict(), Path(output_dir, SCHEDULER_NAME))

    def drop_half_written(self) -> None:
        """Remove what a run that was killed while it saved has left."""
        if self.args.should_save:
            shutil.rmtree(Path(self.args.output_dir) / ".writing", ignore_errors=True)

    def go_on_from(self, checkpoint: Path) -> Any:
        """Train to the end from a checkpoint; say so if its files are run to restore a state.

        Raises:
            RunError: it holds more than tensors and plain values.
        """
        if self.is_deepspeed_enabled:
            logger.warning(
                "DeepSpeed unpickles its optimiser state, which runs whatever is in it: the files "
                "are those that the manifest names, but go on from your own alone"
            )
        try:
            return self.train(resume_from_checkpoint=str(checkpoint))
        except UnpicklingError as error:
            raise RunError(
                "the checkpoint holds more than tensors and plain values; it was not run",
                where=str(checkpoint),
                found=" ".join(str(error).split())[:200],
                do="delete the checkpoint, and find out who changed it",
            ) from error

    def _name_best(self) -> None:
        """Tell transformers where the best checkpoint is now."""
        if self.state.best_global_step:
            name = f"checkpoint-{self.state.best_global_step}"
            self.state.best_model_checkpoint = str(Path(self.args.output_dir) / name)

    def _load_callback_state(self) -> None:
        """Restore what callbacks count: the patience that is left, the losses before a jump.

        transformers would build them anew without their arguments, and restore a request to stop.
        """
        self._name_best()
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, ExportableState):
                kept = self.state.stateful_callbacks.setdefault(type(callback).__name__, {})
                for name, value in kept.get("attributes", {}).items():
                    setattr(callback, name, value)

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
        best = Path(str(self.state.best_model_checkpoint))
        broadcast_from_main(lambda: check_best(best))
        if self._plain:
            restore_weights(self.model, str(self.state.best_model_checkpoint))
        else:
            super()._load_best_model()

    @property
    def _plain(self) -> bool:
        """Whether the student is whole on this rank and has no adapters."""
        sharded = self.is_fsdp_enabled or self.is_deepspeed_enabled
        return not sharded and causal_lm(self.model) is self.model
