"""How like two tiny models are, against naive recomputation in float64: all logits held."""

from __future__ import annotations

import copy
import dataclasses
import math
from typing import Any

import numpy as np
import pytest
import torch

from dominie.evaluation.score_items import compare_models
from dominie.evaluation.scoring import agreement, forgetting
from dominie.evaluation.task import Question


def naive_comparison(model: Any, teacher: Any, question: Question) -> np.ndarray:
    """Tokens, agreements, Σ KL(teacher ‖ model) and Σ next-token loss of a conversation."""
    ids = torch.tensor([question.encoded.input_ids])
    with torch.no_grad():
        ours = torch.log_softmax(model(input_ids=ids).logits[0, :-1], -1)
        theirs = torch.log_softmax(teacher(input_ids=ids).logits[0, :-1], -1)
    chosen = torch.tensor(question.encoded.supervised[1:])
    ours, theirs, labels = ours[chosen], theirs[chosen], ids[0, 1:][chosen]
    divergence = (theirs.exp() * (theirs - ours)).sum()
    loss = -ours.gather(1, labels[:, None]).sum()
    agreed = (ours.argmax(-1) == theirs.argmax(-1)).sum()
    return np.array([float(chosen.sum()), float(agreed), float(divergence), float(loss)])


@pytest.mark.parametrize("batch", [1, 6, 64])
def test_agreement_is_that_of_all_logits_held(model, teacher, asked, batch):
    tracked: list[int] = []

    def track(items: Any, total: int) -> Any:
        tracked.append(total)
        return items

    score = agreement(model, teacher, asked, batch=batch, track=track).result
    sums = np.array([naive_comparison(model, teacher, question) for question in asked])
    tokens, agreed, divergence, loss = sums.T
    assert tracked == [-(-len(asked) // batch)]
    assert score.score == pytest.approx(agreed.sum() / tokens.sum())
    assert 0 < score.score < 1
    assert score.extras["kl"] == pytest.approx(divergence.sum() / tokens.sum(), rel=1e-6)
    assert score.extras["loss"] == pytest.approx(loss.sum() / tokens.sum(), rel=1e-6)
    residual = agreed - score.score * tokens
    n = len(asked)
    expected = np.sqrt((residual**2).sum() * n / (n - 1)) / tokens.sum()
    assert score.stderr == pytest.approx(expected, rel=0.1)
    assert score.interval.low < score.score < score.interval.high
    for name, group in score.by.items():
        members = [i for i, q in enumerate(asked) if q.group == name]
        assert group.score == pytest.approx(agreed[members].sum() / tokens[members].sum())


def test_a_model_agrees_with_itself(model, asked):
    score = agreement(model, model, asked).result
    assert score.score == 1.0
    assert score.stderr == 0.0
    assert score.extras["kl"] == 0.0


@pytest.mark.parametrize("batch", [1, 6, 64])
def test_forgetting_is_the_divergence_from_the_base_with_its_interval(model, teacher, asked, batch):
    scored = forgetting(model, teacher, asked, batch=batch)
    sums = np.array([naive_comparison(model, teacher, question) for question in asked])
    tokens, agreed, divergence, loss = sums.T
    kl = divergence.sum() / tokens.sum()
    result = dataclasses.replace(scored.result, metric="forgetting")
    assert kl > 0.1
    assert result.extras["kl"] == pytest.approx(kl, rel=1e-6)
    assert result.extras["agreement"] == pytest.approx(agreed.sum() / tokens.sum())
    assert result.extras["loss"] == pytest.approx(loss.sum() / tokens.sum(), rel=1e-6)
    assert result.score == pytest.approx(math.exp(-kl), rel=1e-6)
    n = len(asked)
    residual = divergence - kl * tokens
    stderr = np.sqrt((residual**2).sum() * n / (n - 1)) / tokens.sum()
    assert result.stderr == pytest.approx(math.exp(-kl) * stderr, rel=0.1), "the delta method"
    assert result.kl.estimate == result.extras["kl"]
    width = result.kl.high - result.kl.low
    assert result.kl.low < kl < result.kl.high
    assert width == pytest.approx(2 * 1.96 * stderr, rel=0.25)
    assert result.as_dict()["kl_interval"] == [result.kl.low, result.kl.high]
    for name, group in result.by.items():
        members = [i for i, q in enumerate(asked) if q.group == name]
        assert -math.log(group.score) == pytest.approx(
            divergence[members].sum() / tokens[members].sum(), rel=1e-6
        )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_base_has_forgotten_nothing_to_the_last_bit(model, asked, dtype):
    base, same = (copy.deepcopy(model).to(dtype) for _ in range(2))
    for student in (base, same):
        result = dataclasses.replace(forgetting(student, base, asked).result, metric="forgetting")
        assert (result.score, result.extras["kl"], result.extras["agreement"]) == (1.0, 0.0, 1.0)
        assert result.kl.ends == (0.0, 0.0)


def test_models_are_compared_in_pairs_by_what_they_kept(model, teacher, asked):
    near = copy.deepcopy(teacher)
    with torch.no_grad():
        for parameter in near.parameters():
            parameter.mul_(1.02)
    items = {
        name: forgetting(each, teacher, asked).items
        for name, each in {"near": near, "far": model}.items()
    }
    pair = compare_models(items)["near"]["far"]
    assert pair["difference"] > 0
    assert pair["interval"][0] > 0
