"""Callbacks of the trainer: signals that save and stop, and the progress bar."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import FrameType
from typing import Any

from transformers import TrainerCallback

from dominie.core.distributed import all_reduce_max
from dominie.core.errors import DominieError
from dominie.training.counters import held_memory

#: Seconds within which a signal is the one before: SLURM sends it to a launcher and to its ranks,
#: who hear it from the launcher, too.
ECHO = 2.0


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
        self._heard_at = 0.0

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Within, signals are noted instead of obeyed. Only the main thread can listen."""
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
            self.signum, self._heard_at = signum, now
        elif now - self._heard_at > ECHO:
            os._exit(128 + signum)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Ask for a checkpoint and the end, on all processes at the same step."""
        self.signum = all_reduce_max(self.signum or 0) or None
        if self.signum is not None:
            control.should_save = control.should_training_stop = True


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
            self.note = "  ".join(_told(logs))


def _told(logs: Mapping[str, float]) -> Iterator[str]:
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
