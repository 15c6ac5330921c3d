"""Validations and checkpoints by default: parts of a stage's time, and when they are not."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from dominie.training.settings import TrainSettings
from dominie.training.stage_sources import StageSource, StageTraining
from dominie.training.stop_at import StopAt
from dominie.training.time_limits import FRACTIONS, FREE, LimitTime

EVERY = list(range(4, 41, 4))


class Stage:
    """A stage of steps, validations and checkpoints that take so many seconds."""

    def __init__(self, *, step, validation, checkpoint, rows=256, steps=40, **settings):
        self.now, self.seconds = 0.0, {"validation": validation, "checkpoint": checkpoint}
        self.step_seconds, self.steps = step, steps
        source = StageSource(name="s", train=[0], validation=[0] * rows, share=1.0)
        self.limit = LimitTime(
            StageTraining(
                folder=Path("s"), sources=[source], settings=TrainSettings(batch=32, **settings)
            ),
            clock=lambda: self.now,
        )
        self.taken = {"validation": [], "checkpoint": []}

    def run(self, begin=0):
        """As transformers' loop goes, every tenth of the steps and the last due."""
        self.limit.on_train_begin(None, None, None)
        for step in range(begin + 1, self.steps + 1):
            self.now += self.step_seconds
            due = step % (self.steps // 10) == 0
            control = SimpleNamespace(should_evaluate=due, should_save=due)
            state = SimpleNamespace(global_step=step, max_steps=self.steps)
            self.limit.on_step_end(None, state, control)
            for kind, asked, told in (
                ("validation", control.should_evaluate, self.limit.on_evaluate),
                ("checkpoint", control.should_save, self.limit.on_save),
            ):
                if asked:
                    self.now += self.seconds[kind]
                    self.taken[kind].append(step)
                    told(None, state, control)
        return self

    def share(self, kind):
        return len(self.taken[kind]) * self.seconds[kind] / (self.steps * self.step_seconds)


def test_cheap_ones_are_all_taken():
    stage = Stage(step=20, validation=7, checkpoint=4, rows=32).run()
    assert stage.taken == dict.fromkeys(stage.taken, EVERY)


def test_costly_ones_are_left_out_but_the_last(caplog):
    stage = Stage(step=20, validation=115, checkpoint=25).run()
    assert stage.taken["validation"] == [40], "it is known before the first that they cost much"
    assert stage.taken["checkpoint"][-1] == 40
    assert stage.share("checkpoint") <= 0.1 + 25 / 800
    told = [record.getMessage() for record in caplog.records]
    assert len(told) == 2, "each is told once"
    assert "to a tenth of" in told[0]
    assert "to a twentieth of" in told[1]
    assert "train.evaluate_every" in told[0]
    assert "train.checkpoint_every" in told[1]


def test_in_a_long_stage_they_are_spread_and_take_their_part():
    stage = Stage(step=20, validation=115, checkpoint=100, steps=400).run()
    for kind, taken in stage.taken.items():
        part, _ = FRACTIONS[kind]
        assert part / 2 <= stage.share(kind) <= part + stage.seconds[kind] / 8000
        assert min(taken) < 200 < taken[-2], "not all at the beginning"
        assert taken[-1] == 400


def test_a_short_stage_keeps_all_however_small_its_steps():
    stage = Stage(step=0.1, validation=1, rows=32, checkpoint=FREE / 10).run()
    assert stage.taken == dict.fromkeys(stage.taken, EVERY)


@pytest.mark.parametrize(
    ("settings", "kept"),
    [
        ({"evaluate_every": 4}, {"validation"}),
        ({"checkpoint_every": 4}, {"checkpoint"}),
        ({"keep": "best"}, {"validation", "checkpoint"}),
        ({"patience": 3}, {"validation", "checkpoint"}),
        ({"stop_at": StopAt(forgetting=0.1)}, {"validation", "checkpoint"}),
    ],
)
def test_what_is_asked_for_or_decides_the_weights_is_never_left_out(settings, kept):
    stage = Stage(step=20, validation=300, checkpoint=300, **settings).run()
    for kind, taken in stage.taken.items():
        assert (taken == EVERY) == (kind in kept)
