"""Statistics of sums over items, their bootstrap intervals, paired differences, correlation."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from statistics import NormalDist

import numpy as np
import numpy.typing as npt

from dominie.core.task_result import Interval

Floats = npt.NDArray[np.float64]
Statistic = Callable[[Floats], Floats]
"""From sums [..., K] over all items to an estimate [...]."""


def ratio(sums: Floats) -> Floats:
    """Return Σ parts / Σ wholes from sums [..., 2], 0 if nothing was counted."""
    return _over(sums[..., 0], sums[..., 1])


def micro_f1(sums: Floats) -> Floats:
    """Return 2 TP / (2 TP + FP + FN) from sums [..., 3] of TP, FP and FN over all items.

    It is 1 if nothing is to be found and nothing is found.
    """
    hits, others = 2.0 * sums[..., 0], sums[..., 1] + sums[..., 2]
    return np.where(hits + others == 0, 1.0, _over(hits, hits + others))


def macro_f1(sums: Floats) -> Floats:
    """Return the mean F1 of labels from sums [..., 3 L] of TP, FP and FN of each.

    Labels that are neither right nor answered anywhere do not count, as in scikit-learn's
    `f1_score(average="macro")`.
    """
    by_label = sums.reshape(*sums.shape[:-1], -1, 3)
    hits, others = 2.0 * by_label[..., 0], by_label[..., 1] + by_label[..., 2]
    each = _over(hits, hits + others)
    return _over(each.sum(axis=-1), ((hits + others) > 0).sum(axis=-1).astype(np.float64))


def likelihood_kept(sums: Floats) -> Floats:
    """Return exp(−KL) from sums [..., 2] of KL and tokens, 1 if nothing was counted.

    Of tokens that the base draws, the model gives this part of the base's probability, as a
    geometric mean. A KL that rounding has made negative counts as 0.
    """
    kept: Floats = np.exp(-np.maximum(ratio(sums), 0.0))
    return kept


#: By the names under which sums of items are kept, to be compared later.
STATISTICS: dict[str, Statistic] = {
    "ratio": ratio,
    "micro_f1": micro_f1,
    "macro_f1": macro_f1,
    "likelihood_kept": likelihood_kept,
}


def _over(parts: Floats, wholes: Floats) -> Floats:
    return np.divide(parts, wholes, out=np.zeros_like(wholes), where=wholes != 0)


RESAMPLES = 2000
_AT_ONCE = 2**22  # resampled clusters held in memory


def mean_and_stderr(values: Sequence[float]) -> tuple[float, float]:
    """Return the mean of independent values and its standard error, 0 for a single value."""
    n = len(values)
    mean = math.fsum(values) / n
    if n < 2:
        return mean, 0.0
    variance = math.fsum((value - mean) ** 2 for value in values) / (n - 1)
    return mean, math.sqrt(variance / n)


def bootstrap_interval(
    values: npt.ArrayLike,
    clusters: Sequence[Hashable] | None = None,
    *,
    statistic: Statistic | None = None,
    bounds: tuple[float, float] = (0.0, 1.0),
    confidence: float = 0.95,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Interval:
    """Compute a confidence interval by resampling whole clusters.

    Items of one cluster (the turns of a question, the tokens of a conversation) are not
    independent; clusters are, so they are drawn with all their items. BCa corrects percentiles for
    bias and skew (Efron, Better Bootstrap Confidence Intervals, JASA 1987); the acceleration is the
    jackknife's.

    If all clusters are equal, resampling shows no spread and would claim certainty. But n equal
    observations only bound the others at 1 - (1 - confidence)^(1/n) of the population, about 3/n,
    and those may lie anywhere within the bounds. That is the interval then; for one cluster it is
    nearly the whole range.

    Args:
        values: one for each item [N], and the mean is estimated; with a statistic, rows [N, K].
        clusters: what each item belongs to; None is each item to itself.
        statistic: from sums of rows [..., K] to estimates [...], any function of sums.
        bounds: the least and greatest value the estimate can have.
        confidence: of the interval.
        resamples: how many.
        seed: the same seed, the same interval.

    Raises:
        ValueError: no item, items and clusters of different number, values that are not finite, or
            an estimate out of bounds.
    """
    rows, statistic = _rows(values, statistic)
    sums = _cluster_sums(rows, clusters)
    estimate, without = _jackknife(sums, statistic)
    draws = _resampled(sums, statistic, resamples, seed)
    return _interval(estimate, without, draws, bounds, confidence)


def paired_differences(
    values: Mapping[str, npt.ArrayLike],
    clusters: Sequence[Hashable] | None = None,
    *,
    statistic: Statistic | None = None,
    bounds: tuple[float, float] = (0.0, 1.0),
    confidence: float = 0.95,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> dict[tuple[str, str], Interval]:
    """Compute how much higher each scores than those after it, all resampled together.

    What makes an item hard makes it hard for all: a difference is known better than either score.

    Args:
        values: by name, one value for each item [N], or rows [N, K] with a statistic; all in the
            same order of items.
        clusters, statistic, confidence, resamples, seed: as in `bootstrap_interval`.
        bounds: the least and greatest value of each score.

    Returns:
        `{(one, other): interval}` of the score of one less that of the other.

    Raises:
        ValueError: as `bootstrap_interval`, or values of different shape.
    """
    parts: dict[str, tuple[float, Floats, Floats]] = {}
    shapes = set()
    for name, given in values.items():
        rows, of_each = _rows(given, statistic)
        shapes.add(rows.shape)
        if len(shapes) > 1:
            raise ValueError(f"all must answer the same items: {sorted(shapes)}")
        sums = _cluster_sums(rows, clusters)
        # The same seed draws the same clusters for each: that is the pairing.
        parts[name] = (*_jackknife(sums, of_each), _resampled(sums, of_each, resamples, seed))
    span = bounds[1] - bounds[0]
    differences = {}
    for one, other in itertools.combinations(parts, 2):
        (mine, without, draws), (theirs, their_without, their_draws) = parts[one], parts[other]
        differences[one, other] = _interval(
            mine - theirs,
            without - their_without,
            draws - their_draws,
            (-span, span),
            confidence,
        )
    return differences


def _rows(values: npt.ArrayLike, statistic: Statistic | None) -> tuple[Floats, Statistic]:
    """Return values as rows [N, K] and what is estimated from their sums."""
    rows = np.asarray(values, dtype=np.float64)
    if rows.ndim == 1 and statistic is None:
        rows, statistic = np.stack([rows, np.ones_like(rows)], axis=1), ratio
    if not rows.size:
        raise ValueError("there is nothing to estimate from: no values")
    if rows.ndim != 2 or statistic is None:
        raise ValueError(f"values must be [N], or [N, K] with a statistic, got {rows.shape}")
    if not np.isfinite(rows).all():
        raise ValueError("values must be finite")
    return rows, statistic


def _jackknife(sums: Floats, statistic: Statistic) -> tuple[float, Floats]:
    """Return the estimate from all clusters [C, K], and without each of them [C]."""
    whole = sums.sum(axis=0)
    estimate = float(statistic(whole))
    return estimate, statistic(whole - sums) if len(sums) > 1 else np.array([estimate])


def _interval(
    estimate: float,
    without: Floats,
    draws: Floats,
    bounds: tuple[float, float],
    confidence: float,
) -> Interval:
    (low, high), n = bounds, len(without)
    slack = 1e-9 * (high - low)
    if not low - slack <= estimate <= high + slack:
        raise ValueError(f"the estimate {estimate:g} is out of bounds {low:g} to {high:g}")
    alpha = 1.0 - confidence
    if np.ptp(np.append(without, estimate)) <= slack:
        unseen = 1.0 - alpha ** (1.0 / n)
        return Interval(
            estimate,
            max(low, estimate - unseen * (estimate - low)),
            min(high, estimate + unseen * (high - estimate)),
            0.0,
            n,
        )
    levels = _corrected((alpha / 2, 1.0 - alpha / 2), draws, estimate, without)
    ends = np.quantile(draws, levels)
    # For a mean this is the textbook's standard error to the last digit.
    stderr = math.sqrt((n - 1) / n * float(((without - without.mean()) ** 2).sum()))
    return Interval(estimate, float(ends[0]), float(ends[1]), stderr, n)


def _cluster_sums(rows: Floats, clusters: Sequence[Hashable] | None) -> Floats:
    """Sum rows [N, K] by cluster [C, K], clusters in order of appearance."""
    if clusters is None:
        return rows
    if len(clusters) != len(rows):
        raise ValueError(f"{len(rows)} values belong to {len(clusters)} clusters")
    number: dict[Hashable, int] = {}
    of_row = [number.setdefault(cluster, len(number)) for cluster in clusters]
    sums = np.zeros((len(number), rows.shape[1]))
    np.add.at(sums, of_row, rows)
    return sums


def _resampled(sums: Floats, statistic: Statistic, resamples: int, seed: int) -> Floats:
    """Compute the statistic of `resamples` draws of C clusters with replacement."""
    n, random = len(sums), np.random.default_rng(seed)
    at_once = max(1, _AT_ONCE // n)
    draws = []
    for start in range(0, resamples, at_once):
        count = min(at_once, resamples - start)
        drawn = random.integers(n, size=(count, n)) + n * np.arange(count)[:, None]
        times = np.bincount(drawn.ravel(), minlength=count * n).reshape(count, n)
        draws.append(statistic(times @ sums))
    return np.concatenate(draws)


def _corrected(
    levels: tuple[float, float], draws: Floats, estimate: float, without: Floats
) -> tuple[float, float]:
    """Return percentile levels corrected for bias and for skew (Efron 1987, equation 6.8)."""
    normal = NormalDist()
    below = float(np.mean(draws < estimate) + np.mean(draws == estimate) / 2)  # ties are halved
    floor = 0.5 / len(draws)
    bias = normal.inv_cdf(min(1.0 - floor, max(floor, below)))
    centred = without.mean() - without
    spread = float((centred**2).sum() ** 1.5)
    acceleration = float((centred**3).sum()) / (6.0 * spread) if spread else 0.0

    def corrected(level: float) -> float:
        z = bias + normal.inv_cdf(level)
        return normal.cdf(bias + z / (1.0 - acceleration * z))

    return corrected(levels[0]), corrected(levels[1])


def spearman(one: Sequence[float], other: Sequence[float]) -> float | None:
    """Return Spearman's correlation, ties given their mean rank; None if a side is constant."""
    a, b = _ranks(one), _ranks(other)
    if len(a) < 2 or np.ptp(a) == 0 or np.ptp(b) == 0:
        return None
    return float(np.corrcoef(a, b)[0, 1])


def _ranks(values: Sequence[float]) -> Floats:
    _, place, times = np.unique(np.asarray(values), return_inverse=True, return_counts=True)
    last = np.cumsum(times)
    ranks: Floats = (last - (times - 1) / 2)[place]
    return ranks
