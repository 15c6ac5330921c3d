"""What the divergences promise, whatever the distributions."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from dominie.losses.divergence import KINDS, MIXTURES, divergence_and_slope

log_odds = st.floats(-40, 40, allow_nan=False)


def log_probabilities(odds):
    return torch.tensor([odds], dtype=torch.float64).log_softmax(-1)


def divergence(kind, log_s, log_t, beta=0.5):
    return divergence_and_slope(kind, log_s, log_t, beta=beta, gradient=False)[0]


@pytest.mark.parametrize("kind", KINDS)
@settings(deadline=None, max_examples=50)
@given(st.lists(st.tuples(log_odds, log_odds), min_size=2, max_size=6), st.floats(0.01, 0.99))
def test_it_is_never_negative_and_its_slope_moves_no_mass_out(kind, odds, beta):
    log_s, log_t = (log_probabilities(side) for side in zip(*odds, strict=True))
    value, slope = divergence_and_slope(kind, log_s, log_t, beta=beta, gradient=True)
    assert value >= -1e-12
    assert abs(slope.sum()) < 1e-9


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_zero_between_equals(kind):
    log_p = log_probabilities([0.0, 1.0, -3.0])
    assert_close(divergence(kind, log_p, log_p), torch.zeros(1, dtype=torch.float64))


def test_jsd_at_a_half_is_symmetric_and_bounded_by_log_two():
    log_s, log_t = log_probabilities([9.0, 0.0, -9.0]), log_probabilities([-9.0, 0.0, 9.0])
    forth, back = divergence("jsd", log_s, log_t), divergence("jsd", log_t, log_s)
    assert_close(forth, back)
    assert 0.6 < forth < math.log(2)


def test_skewed_kl_tends_to_forward_kl():
    log_s, log_t = log_probabilities([0.3, 1.0, -2.0]), log_probabilities([1.0, 0.0, 0.0])
    limit = divergence("forward_kl", log_s, log_t)
    assert_close(divergence("skewed_kl", log_s, log_t, 1e-9), limit, rtol=0, atol=1e-7)


@pytest.mark.parametrize("kind", MIXTURES)
def test_a_mixture_is_finite_where_a_kl_is_not(kind):
    # Each side is sure of a token that the other's vocabulary lacks, or gives nothing to.
    log_s = torch.tensor([[-200.0, -200.0, 0.0]]).log_softmax(-1)
    log_t = torch.tensor([[0.0, -200.0]]).log_softmax(-1)
    value, slope = divergence_and_slope(kind, log_s, log_t, beta=0.5, gradient=True)
    assert_close(value, torch.tensor([math.log(2)]))
    assert slope.isfinite().all()


@pytest.mark.parametrize("kind", KINDS)
def test_the_arguments_are_left_as_they_were(kind):
    log_s, log_t = torch.randn(3, 5).log_softmax(-1), torch.randn(3, 4).log_softmax(-1)
    copies = log_s.clone(), log_t.clone()
    divergence_and_slope(kind, log_s, log_t, beta=0.3, gradient=True)
    assert torch.equal(log_s, copies[0])
    assert torch.equal(log_t, copies[1])
