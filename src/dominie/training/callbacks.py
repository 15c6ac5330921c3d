"""Callbacks of the trainer: signals that save and stop, the progress bar, trackers."""

from __future__ import annotations

import math
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from dominie.core.distributed import all_reduce_max
from dominie.core.errors import DominieError, RunError
from dominie.core.hardware import trim_memory
from dominie.training.counters import held_memory

if TYPE_CHECKING:
    from dominie.training.source_weights import SourceWeights

#: Seconds within which a signal is the one before: SLURM sends it to a launcher and to its ranks,
#: which get it from the launcher, too.
ECHO = 2.0
#: Steps between calls of `malloc_trim`: one costs milliseconds, 100 steps can hold a gigabyte.
TRIM_EVERY = 10


class Interrupted(DominieError):
    """A signal asked the run to stop, and what was done is saved. Exit status 128 + signal."""

    def __init__(self, signum: int, where: str) -> None:
        self.exit_status = 128 + signum
        super().__init__(
            f"interrupted by {signal.Signals(signum).name}; everything so far is saved",
            where=where,
            do="run the same command again to go on",
        )


class SaveAndStop(TrainerCallback):
    """Ends training at the end of the step in which a signal came, with a checkpoint."""

    def __init__(self) -> None:
        self.signum: int | None = None
        self._received_at = 0.0

    @contextmanager
    def catching(self) -> Iterator[None]:
        """Record signals, which then do not end the process. Only the main thread can."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {s: signal.signal(s, self._note) for s in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for signum, handler in before.items():
                signal.signal(signum, handler)

    def check(self, *, where: str) -> None:
        """Raise if a signal came."""
        if self.signum is not None:
            raise Interrupted(self.signum, where)

    def _note(self, signum: int, _: FrameType | None) -> None:
        now = time.monotonic()
        if self.signum is None:
            self.signum, self._received_at = signum, now
        elif now - self._received_at > ECHO:
            os._exit(128 + signum)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Ask for a checkpoint and the end, on all processes at the same step."""
        self.signum = all_reduce_max(self.signum or 0) or None
        if self.signum is not None:
            control.should_save = control.should_training_stop = True


class StopAtForgetting(TrainerCallback):
    """Ends a stage at the evaluation where the student has moved too far from what it began as.

    transformers keeps the checkpoint of the least `eval_choice`, which this adds to what was
    measured: the loss if that is to decide, else the latest step; infinite beyond a bound. Of that
    step no checkpoint is written, so that a stage that was cut off comes to it again.

    Args:
        bounds: the most forgetting by source, in nats per token.
        by_loss: whether the lowest loss is kept, else the latest model.
        where: the stage, for a message.

    Attributes:
        stopped: of a stage that was ended: the step, the source and its forgetting, the bound, the
            step whose model is kept, and `why` in words.
    """

    def __init__(self, bounds: Mapping[str, float], *, by_loss: bool, where: str) -> None:
        self.bounds, self.by_loss, self.where = bounds, by_loss, where
        self.stopped: dict[str, Any] | None = None

    def on_evaluate(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Look at the forgetting of each source, the same on all processes."""
        metrics: dict[str, float] = given["metrics"]
        found = {source: metrics[f"eval_{source}_forgetting"] for source in self.bounds}
        beyond = [source for source, bound in self.bounds.items() if not found[source] <= bound]
        latest = metrics["eval_loss"] if self.by_loss else -float(state.global_step)
        metrics["eval_choice"] = math.inf if beyond else latest
        if not beyond:
            return
        source = max(beyond, key=lambda each: found[each] / self.bounds[each])
        what = f"forgetting on {source} {found[source]:.3g} nats, above {self.bounds[source]:g}"
        if not state.best_global_step:
            raise RunError(
                "the first evaluation finds the student further from its start than train.stop_at "
                "allows: there is no model to keep",
                where=f"{self.where}, step {state.global_step}",
                found=what,
                do="evaluate earlier (train.evaluate_every), lower train.learning_rate or raise "
                "the bound",
            )
        control.should_save, control.should_training_stop = False, True
        self.stopped = {
            "step": state.global_step,
            "source": source,
            "forgetting": found[source],
            "bound": self.bounds[source],
            "kept_step": state.best_global_step,
            "why": f"{what}, at step {state.global_step} of {state.max_steps}; the model of step "
            f"{state.best_global_step} is kept",
        }


class StepProgress(TrainerCallback):
    """Moves a bar with every optimiser step and shows the newest losses beside it.

    Args:
        advance: called with the completed steps, all steps and a note.
    """

    def __init__(self, advance: Callable[[int, int, str], None]) -> None:
        self.advance, self.note = advance, ""

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Move the bar."""
        self.advance(state.global_step, state.max_steps, self.note)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        """Take the newest losses."""
        if logs and any(name.startswith("term_") for name in logs):
            self.note = "  ".join(_notes(logs))


def _notes(logs: Mapping[str, float]) -> Iterator[str]:
    """What is minimised, how far each source is from its teacher, how fast, in how much memory."""
    for name, value in logs.items():
        if name.startswith("term_"):
            yield f"{name.removeprefix('term_')} {value:.3f}"
    apart = [
        f"{name.removesuffix('_divergence')} {value:.3f}"
        for name, value in logs.items()
        if name.endswith("_divergence")
    ]
    if len(apart) > 1:  # of a single source it is the prediction term
        yield f"KL: {' '.join(apart)}"
    if "tokens_per_second" in logs:
        yield f"{logs['tokens_per_second']:,.0f} tokens/s"
    yield f"{held_memory() / 1e9:.1f} GB"


class LogLastStep(TrainerCallback):
    """Logs and evaluates the last step like every n-th."""

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Ask for it after the last step."""
        if state.global_step >= state.max_steps:
            control.should_log = True
            control.should_evaluate = args.eval_strategy != "no"
            control.should_save |= args.load_best_model_at_end


class TrimMemory(TrainerCallback):
    """Returns to the system, every few steps, what the C library keeps of freed tensors.

    Batches differ in length, so tensors of ever new sizes are made and freed among longer-lived
    ones, and glibc keeps the holes. A process that trains 3.5M parameters and needs 0.7 GB stood at
    2 GB after 60 steps, and was still growing; with this it stays below 0.9 GB at no cost in time.
    """

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Trim after every `TRIM_EVERY`-th step."""
        if state.global_step % TRIM_EVERY == 0:
            trim_memory()


class KeepGaps(TrainerCallback, ExportableState):
    """Has checkpoints keep the gaps that the weights of a stage's sources follow.

    Args:
        weights: of the stage's sources.
    """

    def __init__(self, weights: SourceWeights) -> None:
        self._weights = weights

    @property
    def gaps(self) -> dict[str, float]:
        """Running mean divergence of each source from its expert; a checkpoint sets it."""
        return self._weights.gaps

    @gaps.setter
    def gaps(self, kept: dict[str, float]) -> None:
        self._weights.gaps = kept

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps, as transformers wants it."""
        return {"args": {}, "attributes": {"gaps": dict(self.gaps)}}


class OneRunAStage(TrainerCallback):
    """Lets the next stage begin a run of its own: W&B would go on in that of the stage before."""

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Close W&B's run, which its own callback leaves open."""
        wandb = sys.modules.get("wandb")
        if "wandb" in args.report_to and wandb is not None and wandb.run is not None:
            wandb.finish()


def standard_callbacks(weights: SourceWeights) -> tuple[TrainerCallback, ...]:
    """Those of every stage; `weights` are those of its sources."""
    return KeepGaps(weights), LogLastStep(), TrimMemory(), OneRunAStage()


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
    """Drop what TensorBoard has beyond a step: from there on it is written again.

    Args:
        callbacks: of a trainer whose first process this is, before it trains.
        step: of the checkpoint that training goes on from; 0 without one.
    """
    for callback in callbacks:
        folder = getattr(callback, "logging_dir", None)
        if type(callback).__name__ == "TensorBoardCallback" and folder and Path(folder).is_dir():
            from torch.utils.tensorboard import SummaryWriter

            callback.tb_writer = SummaryWriter(folder, purge_step=step + 1)


def flat_evaluation(
    sources: Mapping[str, Mapping[str, float]], loss: float | None
) -> dict[str, float]:
    """What a validation measured, under names that trackers take."""
    found = {} if loss is None else {"eval_loss": loss}
    for source, values in sources.items():
        found |= {f"eval_{source}_{name}": value for name, value in values.items()}
    return found


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
