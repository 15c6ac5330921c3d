"""Metrics of texts (F1 of tokens, ROUGE-L) and of rankings (NDCG@k, hit@k, recall@k)."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Collection, Sequence

import numpy as np
import numpy.typing as npt

# A word is letters and digits; scripts written without spaces have a word to a character.
_IDEOGRAPH = r"\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff"
_WORD = re.compile(rf"[{_IDEOGRAPH}]|[^\W_{_IDEOGRAPH}]+")


def words(text: str) -> list[str]:
    """The words of a text in lower case, without punctuation."""
    return _WORD.findall(text.lower())


def token_f1(output: str, target: str) -> float:
    """F1 of the words two texts share, repetitions counted (Rajpurkar et al., SQuAD, 2016)."""
    mine, theirs = words(output), words(target)
    return _f1((Counter(mine) & Counter(theirs)).total(), len(mine), len(theirs))


def rouge_l(output: str, target: str) -> float:
    """F1 of the longest common subsequence of words (Lin, ROUGE, 2004, section 3), no stemming."""
    mine, theirs = words(output), words(target)
    return _f1(_common(mine, theirs), len(mine), len(theirs))


def _f1(shared: int, mine: int, theirs: int) -> float:
    """2 · shared / (mine + theirs); 1 where both are empty, since then they are the same."""
    return 2.0 * shared / (mine + theirs) if mine + theirs else 1.0


def _common(a: Sequence[str], b: Sequence[str]) -> int:
    """Length of the longest common subsequence, in memory of one row."""
    row = [0] * (len(b) + 1)
    for word in a:
        before = 0
        for j, other in enumerate(b, 1):
            above = row[j]
            row[j] = before + 1 if word == other else max(above, row[j - 1])
            before = above
    return row[-1]


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


def spearman(one: Sequence[float], other: Sequence[float]) -> float | None:
    """Spearman's correlation, ties given their mean rank; None where either side is constant."""
    a, b = _ranks(one), _ranks(other)
    if len(a) < 2 or np.ptp(a) == 0 or np.ptp(b) == 0:
        return None
    return float(np.corrcoef(a, b)[0, 1])


def _ranks(values: Sequence[float]) -> npt.NDArray[np.float64]:
    _, place, times = np.unique(np.asarray(values), return_inverse=True, return_counts=True)
    last = np.cumsum(times)
    ranks: npt.NDArray[np.float64] = (last - (times - 1) / 2)[place]
    return ranks
