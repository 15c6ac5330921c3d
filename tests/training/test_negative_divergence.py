"""A divergence below zero ends a stage, unless the samples of a cache explain it."""

from __future__ import annotations

import contextlib

import pytest
import torch

from dominie.core.errors import RunError
from dominie.data.tokenization import Encoded
from dominie.losses.objective import Objective
from dominie.losses.targets import Part, Signal, SparseTarget
from dominie.losses.terms import LossTerms, NextToken, Prediction
from dominie.training.monitoring import Monitor


@pytest.mark.parametrize(
    ("divergence", "tokens", "temperature", "refused"),
    [
        (0.0, 1, 1.0, False),
        (-0.01, 100_000, 1.0, False),
        (-0.08, 100_000, 1.0, True),
        (-0.08, 1_000, 1.0, False),
        (-0.5, 1_000, 1.0, True),
        (-0.5, 1_000, 2.0, False),
        (-110.0, 100_000, 10.0, True),
    ],
)
def test_noise_is_told_from_what_cannot_be(divergence, tokens, temperature, refused):
    monitor = Monitor(sources=["d", "plain"], log=None, flops=None)
    taught = LossTerms(prediction=Prediction(temperature=temperature))
    objective = Objective([taught, LossTerms(next_token=NextToken())])
    means = {
        "d": {"tokens": tokens, "divergence": divergence},
        "plain": {"tokens": tokens, "next_token": 1.0},
    }
    refusal = pytest.raises(RunError, match=f"stage a(?s:.*)d: {divergence:.4g}")
    with refusal if refused else contextlib.nullcontext():
        monitor.check_divergence(means, objective, where="stage a")


class WrongEntropy:
    """A cached teacher whose stored entropy is too high: its divergence comes out negative."""

    def signal(self, batch):
        count = int(batch.supervised.sum())
        ids = torch.zeros(count, 1, dtype=torch.long)
        sparse = SparseTarget(ids, torch.ones(count, 1), None, torch.full((count,), 60.0))
        return Signal((Part(torch.arange(len(batch.input_ids)), sparse),))


def test_a_stage_ends_at_the_first_line_of_metrics_that_shows_one(step_gradient, student):
    rows = [[Encoded(list(range(1, 21)), [True] * 20)] * 4]
    taught = [LossTerms(prediction=Prediction())]
    with pytest.raises(RunError, match=r"negative, beyond noise(?s:.*)nats per token"):
        step_gradient(student, rows, taught, teacher=WrongEntropy(), micro_batch=4)
