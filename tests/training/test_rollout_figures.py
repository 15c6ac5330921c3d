"""What is counted of a student's answers, and that each thing that goes wrong has its warning."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import pytest

from dominie.training.rollout_figures import RolloutFigures
from dominie.training.rollouts import Rollout, RolloutKey, RolloutSettings, repetition

FIVE = [1, 2, 3, 4, 5]
Warned = Callable[..., list[str]]


@pytest.fixture
def warned(caplog) -> Warned:
    """The warnings of lines of metrics, of answers (and whether they ended) step by step."""

    def of(
        steps: Iterable[Sequence[tuple[list[int], bool]]],
        divergence: float = 0.1,
        figures: RolloutFigures | None = None,
        begin: int = 1,
    ) -> list[str]:
        caplog.clear()
        figures = figures or RolloutFigures(["own"])
        with caplog.at_level(logging.WARNING):
            for step, answers in enumerate(steps, begin):
                keys = (RolloutKey(step, "own", row) for row in range(len(answers)))
                rows = zip(keys, answers, strict=True)
                figures.add_step([("own", Rollout(key, [0], *each)) for key, each in rows])
                figures.add_step([("other", None)])
                values = np.full((7, 2), divergence)
                figures.add_values("own", values, own=True)
                figures.warn(figures.log_entry(lambda tensor: tensor), step)
        return [record.getMessage() for record in caplog.records]

    return of


def test_answers_that_end_near_their_teacher_warn_of_nothing(warned):
    assert warned([[(FIVE, True)] * 4] * 3, divergence=0.149) == []


def test_a_teacher_that_is_far_at_first_is_told_once(warned):
    (message,) = warned([[(FIVE, True)]] * 3, divergence=0.151)
    assert "own: the student's first answers are 0.151 nats per token" in message
    assert "more than 0.15" in message
    figures = RolloutFigures(["own"])
    assert warned([[(FIVE, True)]], divergence=0.1, figures=figures) == []
    assert warned([[(FIVE, True)]], divergence=0.3, figures=figures, begin=2) == []
    lines = [{"step": 1, "sources": {"own": {"answer_tokens": 5.0}}}, {"step": 2}]
    assert warned([[(FIVE, True)]], divergence=0.3, figures=RolloutFigures(["own"], lines)) == []


def test_lengths_that_run_away_are_told(warned):
    long = [(list(range(11)), False), (list(range(11)), False), (list(range(11)), True)]
    (message,) = warned([[(FIVE, True)] * 3, long])
    assert "step 2: answers run away: 11 tokens on average, 5 at first, 67 % cut off" in message
    ended = [(list(range(11)), True)] * 3
    assert warned([[(FIVE, True)] * 3, ended]) == []  # longer, and they end
    lines = [{"step": 3, "sources": {"own": {"answer_tokens": 5.0}}}]
    assert len(warned([long], figures=RolloutFigures(["own"], lines), begin=4)) == 1


def test_answers_that_are_all_cut_off_are_told(warned):
    (message,) = warned([[(FIVE, False)] * 2])
    assert "step 1: every answer is cut off" in message
    assert warned([[(FIVE, False), (FIVE, True)]]) == []


def test_while_answers_may_grow_their_lengths_are_no_fault(warned):
    growing = [[(list(range(4 * step)), False)] for step in (1, 2, 3)]
    figures = RolloutFigures(["own"], grown=4)
    assert warned(growing, figures=figures) == []
    assert warned([[(FIVE, True)]], figures=figures, begin=4) == []
    (message,) = warned([[(list(range(12)), False)]], figures=figures, begin=5)
    assert "12 tokens on average, 5 at first" in message


def test_loops_are_told(warned):
    (message,) = warned([[([1, 2] * 8, True)]])
    assert "85 % of their runs of four tokens stood before" in message
    assert repetition([1, 2] * 8) == pytest.approx(1 - 2 / 13)
    assert repetition([1, 2, 3]) == 0.0


def test_figures_are_means_over_answers_and_tokens():
    figures = RolloutFigures(["own", "none"])
    rollouts: list[Any] = [
        Rollout(RolloutKey(1, "own", 0), [0], FIVE, ended=True),
        Rollout(RolloutKey(1, "own", 1), [0], FIVE * 3, ended=False),
        None,
        None,
    ]
    figures.add_step([("own", each) for each in rollouts])
    figures.add_values("own", np.array([[1.0, 2.0], [3.0, 4.0]]), own=True)
    figures.add_values("own", np.array([[5.0, 6.0]]), own=False)
    assert figures.log_entry(lambda tensor: 2 * tensor) == {  # as on two ranks
        "own": {
            "own": 0.5,
            "answer_tokens": 10.0,
            "answer_cut": 0.5,
            "answer_ended": 0.5,
            "repetition": round((1 - 5 / 12) / 2, 6),
            "divergence_own": 2.0,
            "divergence_data": 5.0,
            "entropy": 3.0,
        }
    }
    assert figures.log_entry(lambda tensor: tensor) == {}


def test_the_bound_on_answers_grows_to_the_end_of_its_part_of_the_stage():
    grows = RolloutSettings(max_new_tokens=20, start_new_tokens=4, grow_over=0.5)
    lengths = [grows.longest_at(step, 10) for step in range(10)]
    assert lengths == [4, 8, 12, 16, 20, 20, 20, 20, 20, 20]
    assert grows.grown_at(10) == 5
    whole = RolloutSettings(max_new_tokens=20, start_new_tokens=4)
    assert [whole.longest_at(step, 5) for step in range(5)] == [4, 8, 12, 16, 20]
    assert whole.longest_at(0, 1) == 4
    assert RolloutSettings(max_new_tokens=20).grown_at(10) == 1
    assert "start_new_tokens" not in RolloutSettings().identity
    assert grows.identity["start_new_tokens"] == 4
