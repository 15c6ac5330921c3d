"""The progress bar of a stage."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from transformers import TrainerCallback

from dominie.training.memory import held_memory


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
