"""Scores as functions of sums over items, so that any of them can be resampled by adding rows."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Statistic = Callable[[Floats], Floats]
"""From sums [..., K] over all items to an estimate [...]."""


def ratio(sums: Floats) -> Floats:
    """Σ parts / Σ wholes from sums [..., 2], 0 where nothing was counted."""
    return _over(sums[..., 0], sums[..., 1])


def micro_f1(sums: Floats) -> Floats:
    """F1 = 2 TP / (2 TP + FP + FN) from sums [..., 3] of TP, FP and FN over all items.

    Where nothing is to be found and nothing is found, all is well: 1.
    """
    hits, others = 2.0 * sums[..., 0], sums[..., 1] + sums[..., 2]
    return np.where(hits + others == 0, 1.0, _over(hits, hits + others))


def macro_f1(sums: Floats) -> Floats:
    """The mean F1 of labels from sums [..., 3 L] of TP, FP and FN of each.

    Of the labels, those that are neither right nor answered anywhere do not count, as in
    scikit-learn's `f1_score(average="macro")`.
    """
    by_label = sums.reshape(*sums.shape[:-1], -1, 3)
    hits, others = 2.0 * by_label[..., 0], by_label[..., 1] + by_label[..., 2]
    each = _over(hits, hits + others)
    return _over(each.sum(axis=-1), ((hits + others) > 0).sum(axis=-1).astype(np.float64))


#: By the names under which sums of items are kept, to be compared later.
STATISTICS: dict[str, Statistic] = {"ratio": ratio, "micro_f1": micro_f1, "macro_f1": macro_f1}


def _over(parts: Floats, wholes: Floats) -> Floats:
    return np.divide(parts, wholes, out=np.zeros_like(wholes), where=wholes != 0)
