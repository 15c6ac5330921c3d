"""TensorBoard, W&B, trackio and the like through transformers: a run of theirs for each stage."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

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
