"""Means and standard errors against numpy, and against what they claim."""

from __future__ import annotations

import numpy as np
import pytest

from dominie.evaluation.statistics import mean_and_stderr, ratio_and_stderr


@pytest.mark.parametrize("n", [2, 3, 50])
def test_mean_and_standard_error_are_numpy_s(n):
    values = np.random.default_rng(n).normal(3, 2, n)
    mean, stderr = mean_and_stderr(values.tolist())
    assert mean == pytest.approx(values.mean())
    assert stderr == pytest.approx(values.std(ddof=1) / np.sqrt(n))


def test_one_value_has_no_error_to_speak_of():
    assert mean_and_stderr([0.25]) == (0.25, 0.0)
    assert ratio_and_stderr([1.0], [4.0]) == (0.25, 0.0)


def test_nothing_counted_is_nothing():
    assert ratio_and_stderr([0.0, 0.0], [0.0, 0.0]) == (0.0, 0.0)


def test_a_ratio_of_equal_clusters_is_a_mean():
    values = np.random.default_rng(1).random(30)
    ratio, stderr = ratio_and_stderr((7 * values).tolist(), [7.0] * 30)
    mean, expected = mean_and_stderr(values.tolist())
    assert ratio == pytest.approx(mean)
    assert stderr == pytest.approx(expected)


def test_the_error_of_a_ratio_is_its_spread_over_samples():
    """5000 samples of 80 conversations whose tokens are alike within a conversation."""
    rng = np.random.default_rng(2)
    ratios, errors = [], []
    for _ in range(5000):
        sizes = rng.integers(1, 20, 80)
        parts = rng.binomial(sizes, rng.beta(2, 2, 80))
        ratio, stderr = ratio_and_stderr(parts.tolist(), sizes.tolist())
        ratios.append(ratio)
        errors.append(stderr)
    assert np.mean(errors) == pytest.approx(np.std(ratios), rel=0.05)
    assert np.mean(ratios) == pytest.approx(0.5, abs=0.005)
