"""Metrics against scikit-learn and rouge-score, where the full tests have them."""

from __future__ import annotations

import numpy as np
import pytest

from dominie.evaluation.answer_text import ndcg, rouge_l
from dominie.evaluation.statistics import macro_f1, micro_f1

pytestmark = pytest.mark.full


def test_rouge_l_is_rouge_score_s():
    scorer = pytest.importorskip("rouge_score.rouge_scorer", reason="lm-eval brings rouge-score")
    reference = scorer.RougeScorer(["rougeL"], use_stemmer=False)
    rng = np.random.default_rng(0)
    words = ["red", "a", "Hat,", "lamp", "no-one", "9", "the"]
    for _ in range(300):
        output, target = (" ".join(rng.choice(words, rng.integers(1, 12))) for _ in range(2))
        expected = reference.score(target, output)["rougeL"].fmeasure
        assert rouge_l(output, target) == pytest.approx(expected), (output, target)


@pytest.mark.parametrize("labels", [2, 3, 7])
def test_f1_is_scikit_learn_s(labels):
    metrics = pytest.importorskip("sklearn.metrics", reason="scikit-learn is not installed")
    rng = np.random.default_rng(labels)
    for _ in range(50):
        right, answer = rng.integers(labels, size=(2, 20))
        counts = []
        for label in range(labels):
            wanted, given = right == label, answer == label
            hits = int((wanted & given).sum())
            counts.append([hits, int(given.sum()) - hits, int(wanted.sum()) - hits])
        sums = np.array(counts, dtype=float)
        expected = metrics.f1_score(right, answer, average="macro", zero_division=0)
        assert macro_f1(sums.ravel()) == pytest.approx(expected)
        if sums[1].sum():
            expected = metrics.f1_score(right == 1, answer == 1, zero_division=0)
            assert micro_f1(sums[1]) == pytest.approx(expected)


@pytest.mark.parametrize("k", [None, 1, 3])
def test_ndcg_is_scikit_learn_s(k):
    metrics = pytest.importorskip("sklearn.metrics", reason="scikit-learn is not installed")
    rng = np.random.default_rng(2)
    for _ in range(50):
        relevances = rng.integers(0, 4, 6)
        order = rng.permutation(6)
        scores = np.empty(6)
        scores[order] = np.arange(6, 0, -1)
        gains = 2.0**relevances - 1
        expected = metrics.ndcg_score([gains], [scores], k=k) if gains.any() else 0.0
        assert ndcg((order + 1).tolist(), relevances.tolist(), k) == pytest.approx(expected)
