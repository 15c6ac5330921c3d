"""How good a ranking is: NDCG@k, hit@k and recall@k."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence


def ndcg(ranked: Sequence[int], relevances: Sequence[float], k: int | None = None) -> float:
    """Normalised discounted cumulative gain, gain 2^relevance - 1 (Burges et al., 2005).

    Args:
        ranked: items numbered from 1, the best first, none twice; unknown numbers gain nothing.
        relevances: of the items in their order.
        k: places that count; None counts all.

    Returns:
        From 0 to 1; 0 where nothing is relevant.
    """
    gains = [relevances[i - 1] if 1 <= i <= len(relevances) else 0.0 for i in ranked]
    best = _discounted(sorted(relevances, reverse=True)[:k])
    return min(1.0, _discounted(gains[:k]) / best) if best > 0 else 0.0


def hit(ranked: Sequence[int], relevant: Collection[int], k: int | None = None) -> float:
    """1 if any relevant item is among the first k."""
    return float(bool(set(ranked[:k]) & set(relevant)))


def recall(ranked: Sequence[int], relevant: Collection[int], k: int | None = None) -> float:
    """The part of the relevant items among the first k (ShoppingMMLU's "hit rate")."""
    wanted = set(relevant)
    return len(set(ranked[:k]) & wanted) / len(wanted) if wanted else 0.0


def _discounted(gains: Sequence[float]) -> float:
    return math.fsum(
        (2.0**gain - 1.0) / math.log2(place + 1) for place, gain in enumerate(gains, 1)
    )
