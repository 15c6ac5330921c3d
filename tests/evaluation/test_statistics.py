"""Means, errors and intervals against numpy, and against what they claim."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from dominie.core.task_result import Interval
from dominie.evaluation.statistics import (
    bootstrap_interval,
    macro_f1,
    mean_and_stderr,
    micro_f1,
    paired_differences,
    ratio,
)


@pytest.mark.parametrize("n", [2, 3, 50])
def test_mean_and_standard_error_are_numpy_s(n):
    values = np.random.default_rng(n).normal(3, 2, n)
    mean, stderr = mean_and_stderr(values.tolist())
    assert mean == pytest.approx(values.mean())
    assert stderr == pytest.approx(values.std(ddof=1) / np.sqrt(n))


def test_one_value_has_no_error_to_speak_of():
    assert mean_and_stderr([0.25]) == (0.25, 0.0)


def test_statistics_of_sums_are_their_formulas():
    assert ratio(np.array([3.0, 4.0])) == 0.75
    assert ratio(np.array([0.0, 0.0])) == 0.0, "nothing counted"
    assert micro_f1(np.array([[2.0, 1.0, 3.0], [0.0, 0.0, 0.0]])).tolist() == [0.5, 1.0]
    # Labels with F1 2/3 and 1/2, and one that occurs nowhere.
    sums = np.array([1.0, 1.0, 0.0, 1.0, 1.0, 1.0, 0.0, 0.0, 0.0])
    assert macro_f1(sums) == pytest.approx((2 / 3 + 1 / 2) / 2)


def test_the_error_of_a_mean_is_the_textbook_s():
    values = np.random.default_rng(1).random(30)
    interval = bootstrap_interval(values)
    mean, stderr = mean_and_stderr(values.tolist())
    assert interval.estimate == pytest.approx(mean)
    assert interval.stderr == pytest.approx(stderr)


def test_the_error_of_a_ratio_is_its_spread_over_samples():
    """1000 samples of 80 conversations whose tokens are alike within a conversation."""
    rng = np.random.default_rng(2)
    found = []
    for _ in range(1000):
        sizes = rng.integers(1, 20, 80)
        parts = rng.binomial(sizes, rng.beta(2, 2, 80))
        found.append(bootstrap_interval(np.stack([parts, sizes], 1), statistic=ratio, resamples=2))
    ratios = [interval.estimate for interval in found]
    assert np.mean([interval.stderr for interval in found]) == pytest.approx(
        np.std(ratios), rel=0.1
    )
    assert np.mean(ratios) == pytest.approx(0.5, abs=0.01)


def covered(true: float, intervals: list[Interval]) -> float:
    return float(np.mean([interval.low <= true <= interval.high for interval in intervals]))


def paired_difference(a: Any, b: Any, **options: Any) -> Interval:
    return paired_differences({"a": a, "b": b}, **options)["a", "b"]


def test_intervals_hold_the_truth_as_often_as_they_say():
    """500 samples of 60 skewed values: 95 ± 3 % of the intervals hold the mean."""
    rng = np.random.default_rng(3)
    samples = rng.beta(1, 3, (500, 60))
    intervals = [bootstrap_interval(x, resamples=400) for x in samples]
    assert covered(0.25, intervals) == pytest.approx(0.95, abs=0.03)
    assert intervals[0].n == 60
    assert np.mean([i.stderr for i in intervals]) == pytest.approx(samples.mean(1).std(), rel=0.1)


def test_clusters_matter():
    """Ten alike answers to each of 40 questions are 40 facts, not 400."""
    rng = np.random.default_rng(4)
    names = [f"question {i}" for i in range(40) for _ in range(10)]
    clustered, naive = [], []
    for _ in range(200):
        values = rng.random(400) < np.repeat(rng.beta(0.5, 0.5, 40), 10)
        clustered.append(bootstrap_interval(values, names, resamples=400))
        naive.append(bootstrap_interval(values, resamples=400))
    assert covered(0.5, clustered) == pytest.approx(0.95, abs=0.04)
    assert covered(0.5, naive) < 0.75
    assert clustered[0].n == 40
    assert naive[0].n == 400
    assert clustered[0].estimate == naive[0].estimate


def test_clusters_of_unequal_size_weigh_by_their_items():
    interval = bootstrap_interval([1, 1, 1, 0, 0, 1], [1, 1, 1, 2, 2, 3])
    assert interval.estimate == pytest.approx(4 / 6)
    order = [3, 0, 5, 1, 4, 2]
    values, clusters = np.array([1, 1, 1, 0, 0, 1]), np.array([1, 1, 1, 2, 2, 3])
    mixed = bootstrap_interval(values[order], clusters[order].tolist())
    assert mixed.n == 3
    assert mixed.estimate == interval.estimate


def test_a_statistic_of_sums_is_resampled_as_a_whole():
    rng = np.random.default_rng(5)
    sizes = rng.integers(1, 20, 80).astype(float)
    parts = sizes * rng.random(80)
    interval = bootstrap_interval(np.stack([parts, sizes], 1), statistic=ratio)
    estimate = parts.sum() / sizes.sum()
    residual = parts - estimate * sizes  # of the ratio estimator (Cochran 1977, 2.11)
    stderr = np.sqrt((residual**2).sum() * 80 / 79) / sizes.sum()
    assert interval.estimate == pytest.approx(estimate)
    assert interval.stderr == pytest.approx(stderr, rel=0.05)
    assert interval.high - interval.low == pytest.approx(3.92 * stderr, rel=0.1)


def test_pairing_shrinks_what_is_not_known():
    rng = np.random.default_rng(6)
    hard = rng.random(300)
    a = (hard + rng.normal(0, 0.05, 300) < 0.62).astype(float)
    b = (hard + rng.normal(0, 0.05, 300) < 0.55).astype(float)
    paired = paired_difference(a, b)
    assert paired.estimate == pytest.approx(a.mean() - b.mean())
    apart = [bootstrap_interval(side) for side in (a, b)]
    assert apart[0].low < apart[1].high, "either interval alone tells nothing"
    assert not paired.within_noise, "the pairs do"
    assert paired.high - paired.low < 0.6 * sum(i.high - i.low for i in apart) / 2
    other = paired_difference(b, a)
    assert other.estimate == -paired.estimate
    shuffled = paired_difference(a, rng.permutation(b))
    assert shuffled.high - shuffled.low > 1.5 * (paired.high - paired.low)


def test_paired_intervals_hold_the_truth():
    rng = np.random.default_rng(7)
    intervals = []
    for _ in range(500):
        hard = rng.random(60)
        sides = [(hard + rng.normal(0, 0.3, 60) < level).astype(float) for level in (0.5, 0.5)]
        intervals.append(paired_difference(*sides, resamples=400))
    assert covered(0.0, intervals) == pytest.approx(0.95, abs=0.03)


def test_a_paired_statistic_is_that_of_either_side():
    a = np.array([[1.0, 2.0], [3.0, 4.0], [0.0, 2.0]])
    b = np.array([[1.0, 4.0], [1.0, 1.0], [1.0, 1.0]])
    assert paired_difference(a, b, statistic=ratio).estimate == pytest.approx(4 / 8 - 3 / 6)


def test_all_pairs_are_those_of_two():
    rng = np.random.default_rng(9)
    values = {name: (rng.random(40) < 0.5).astype(float) for name in ("a", "b", "c")}
    pairs = paired_differences(values)
    assert list(pairs) == [("a", "b"), ("a", "c"), ("b", "c")]
    for (one, other), interval in pairs.items():
        assert interval == paired_difference(values[one], values[other])


def test_the_same_seed_is_the_same_interval():
    values = np.random.default_rng(8).random(50)
    first = bootstrap_interval(values)
    assert first == bootstrap_interval(values)
    assert first.low != bootstrap_interval(values, seed=1).low
    assert first.estimate == bootstrap_interval(values, seed=1).estimate


def test_one_question_says_next_to_nothing():
    interval = bootstrap_interval([1.0, 1.0, 0.0], ["q", "q", "q"])
    assert (interval.n, interval.estimate) == (1, pytest.approx(2 / 3))
    assert interval.low < 0.05
    assert interval.high > 0.95
    assert paired_difference([1.0], [0.0]).within_noise


@pytest.mark.parametrize(("value", "low", "high"), [(0, 0, 0.0295), (1, 0.9705, 1)])
def test_alike_answers_are_not_certainty(value, low, high):
    """None of 100 wrong: at most 3 % of all are (Clopper and Pearson, 1934)."""
    interval = bootstrap_interval([value] * 100)
    assert interval.estimate == value
    assert (interval.low, interval.high) == (
        pytest.approx(low, abs=1e-4),
        pytest.approx(high, abs=1e-4),
    )
    equal = paired_difference([value] * 100, [value] * 100)
    assert equal.within_noise
    assert equal.high == pytest.approx(0.0295, abs=1e-4)


def test_always_better_is_better():
    assert not paired_difference([1.0] * 20, [0.0] * 20).within_noise


def test_what_cannot_be_estimated_is_refused():
    with pytest.raises(ValueError, match="no values"):
        bootstrap_interval([])
    with pytest.raises(ValueError, match="no values"):
        paired_difference([], [])
    with pytest.raises(ValueError, match="finite"):
        bootstrap_interval([0.0, float("nan")])
    with pytest.raises(ValueError, match="3 values belong to 2 clusters"):
        bootstrap_interval([0.0, 1.0, 1.0], ["a", "b"])
    with pytest.raises(ValueError, match="same items"):
        paired_difference([0.0, 1.0], [0.0])
    with pytest.raises(ValueError, match="out of bounds 0 to 1"):
        bootstrap_interval([7.0, 8.0])
    assert bootstrap_interval([7.0, 8.0], bounds=(1, 10)).estimate == 7.5
