"""Signals while a stage trains: the first saves and stops, its echo is no second one."""

from __future__ import annotations

import os
import signal
from types import SimpleNamespace

import pytest

from dominie.training import callbacks as interruption
from dominie.training.callbacks import ECHO, Interrupted, SaveAndStop


@pytest.fixture
def clock(monkeypatch):
    """A time that stands still, and what ended the process."""
    now, left = SimpleNamespace(seconds=100.0), []
    monkeypatch.setattr(interruption.time, "monotonic", lambda: now.seconds)
    monkeypatch.setattr(interruption.os, "_exit", left.append)
    now.left = left
    return now


def test_a_signal_that_comes_twice_at_once_is_one(clock):
    """SLURM signals every process of a job, and the launcher passes on what it was sent."""
    stop = SaveAndStop()
    with stop.catching():
        os.kill(os.getpid(), signal.SIGTERM)
        clock.seconds += 0.5 * ECHO
        os.kill(os.getpid(), signal.SIGTERM)
    assert clock.left == []
    control = SimpleNamespace(should_save=False, should_training_stop=False)
    stop.on_step_end(None, None, control)
    assert control.should_save
    assert control.should_training_stop
    with pytest.raises(Interrupted) as stopped:
        stop.check(where="stage s, step 3")
    assert stopped.value.exit_status == 128 + signal.SIGTERM


def test_one_that_follows_later_stops_at_once(clock):
    stop = SaveAndStop()
    with stop.catching():
        os.kill(os.getpid(), signal.SIGTERM)
        clock.seconds += ECHO + 0.1
        os.kill(os.getpid(), signal.SIGINT)
    assert clock.left == [128 + signal.SIGINT]
