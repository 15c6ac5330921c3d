"""Limits the time that validations and checkpoints take from a stage, where nobody asked for them.

By default a stage is validated and saved ten times. Where that takes longer than it helps (few,
costly steps), those that are due are left out. The clock decides, so that two runs may differ in
which of their validations and checkpoints there are; weights and scores never do: see
docs/reliability.md.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any

from transformers import TrainerCallback

from dominie.core.distributed import all_reduce_max
from dominie.training.stage_sources import StageTraining

logger = logging.getLogger(__name__)

#: Of the time that a stage has learnt; also in words.
FRACTIONS = {"validation": (0.1, "tenth"), "checkpoint": (0.05, "twentieth")}
#: Seconds that either may take in any case: where the whole stage is short, nobody is kept waiting.
FREE = 30.0


class LimitTime(TrainerCallback):
    """Leaves out validations and checkpoints that are due, if they would take too much time.

    Validations may take a tenth of the time in which this process has taken steps, checkpoints a
    twentieth, and either `FREE` seconds in any case. The last ones are never left out. A validation
    that nobody has timed yet is taken to cost as much as training on so many conversations, which
    is more than its forward passes do.

    It stands before all callbacks that ask for a validation or checkpoint of their own accord.

    Args:
        stage: what is trained. What `evaluate_every` or `checkpoint_every` asks for, and what
            decides which weights the stage ends with, is not limited.
        clock: seconds.
    """

    def __init__(
        self, stage: StageTraining, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        settings, validated = stage.settings, sum(len(each.validation) for each in stage.sources)
        self.where, self.clock = f"stage {stage.folder.name}", clock
        self.limited = {
            "validation": settings.evaluate_every is None and not settings.validation_decides,
            "checkpoint": settings.checkpoint_every is None and not settings.validation_decides,
        }
        self.spent = dict.fromkeys(self.limited, 0.0)
        self.last: dict[str, float | None] = dict.fromkeys(self.limited)
        self.steps, self.begun = 0, 0.0
        self._steps_of_a_validation = validated / settings.batch
        self._since, self._told = 0.0, set[str]()

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Start the clock."""
        self.begun = self.clock()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Withdraw what is due and would take too long, alike on all processes."""
        self.steps, self._since = self.steps + 1, self.clock()
        if state.global_step >= state.max_steps:
            return
        learnt = self._since - self.begun - sum(self.spent.values())
        guess = self._steps_of_a_validation * learnt / self.steps
        for kind, due in (
            ("validation", control.should_evaluate),
            ("checkpoint", control.should_save),
        ):
            if not (due and self.limited[kind]):
                continue
            known = self.last[kind]
            cost = (guess if kind == "validation" else 0.0) if known is None else known
            beyond = self.spent[kind] + cost > max(FREE, FRACTIONS[kind][0] * learnt)
            if all_reduce_max(int(beyond)):
                self._leave_out(kind, control, cost)

    def on_evaluate(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Take the time of a validation."""
        self._count("validation")

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Take the time of a checkpoint."""
        self._count("checkpoint")

    def _count(self, kind: str) -> None:
        now = self.clock()
        self.last[kind] = now - self._since
        self.spent[kind] += now - self._since
        self._since = now

    def _leave_out(self, kind: str, control: Any, cost: float) -> None:
        if kind == "validation":
            control.should_evaluate, key = False, "evaluate_every"
        else:
            control.should_save, key = False, "checkpoint_every"
        if kind not in self._told:
            self._told.add(kind)
            logger.warning(
                "%s: %ss take about %.0f s each; to keep them to a %s of the stage's time, some "
                "are left out, but never the last (train.%s asks for every n-th step)",
                self.where, kind, cost, FRACTIONS[kind][1], key,
            )  # fmt: skip
