"""The progress bar of a stage."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from transformers import TrainerCallback


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
        terms = {
            name.removeprefix("term_"): v
            for name, v in (logs or {}).items()
            if name.startswith("term_")
        }
        if terms:
            self.note = "  ".join(f"{name} {value:.3f}" for name, value in terms.items())
