"""Sparse targets: the tail is charged, and safely."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from dominie.losses import SparseTarget, vocabulary_losses
from dominie.losses.targets import sparse_forward_kl


def stored(teacher, k):
    """The k likeliest tokens of probabilities [N, V] and what is left."""
    probabilities, ids = teacher.topk(k)
    return SparseTarget(ids, probabilities, 1 - probabilities.sum(-1))


def naive(log_s, target):
    """The definition, 1 − Σ s and all."""
    s, p = log_s.exp().gather(1, target.ids), target.probabilities
    rest = 1 - s.sum(-1)
    return (p * (p / s).log()).sum(-1) + target.tail * (target.tail / rest).log()


@pytest.fixture
def teacher():
    return torch.randn(7, 11, dtype=torch.float64).softmax(-1)


@pytest.fixture
def logits():
    return torch.randn(7, 11, dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize("k", [1, 4, 10])
def test_value_and_gradient_match_the_definition(teacher, logits, k):
    target = stored(teacher, k)
    value, slope = sparse_forward_kl(logits.detach().log_softmax(-1), target, gradient=True)
    wanted = naive(logits.log_softmax(-1), target)
    assert_close(value, wanted)
    assert_close(slope, torch.autograd.grad(wanted.sum(), logits)[0])


@pytest.mark.parametrize("labels", [None, torch.tensor([0, 3, -100, 10, 2, -100, 6])])
@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_numeric_gradient_through_a_head(teacher, temperature, labels):
    hidden = torch.randn(7, 3, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(11, 3, dtype=torch.float64, requires_grad=True)
    target = stored(teacher, 4)

    def loss(hidden, weight):
        return vocabulary_losses(
            hidden, weight, target, labels=labels, temperature=temperature
        ).total

    assert torch.autograd.gradcheck(loss, (hidden, weight))
    log_s = (hidden @ weight.t() / temperature).log_softmax(-1)
    divergence = vocabulary_losses(hidden, weight, target, temperature=temperature).divergence
    assert_close(divergence, temperature**2 * naive(log_s, target).sum())


def test_all_tokens_stored_is_the_full_divergence(teacher, logits):
    whole = stored(teacher, 11)
    dense = (teacher * (teacher.log() - logits.log_softmax(-1))).sum(-1)
    value, slope = sparse_forward_kl(logits.detach().log_softmax(-1), whole, gradient=True)
    assert_close(value, dense)
    assert_close(slope, torch.autograd.grad(dense.sum(), logits)[0])


def test_it_is_a_lower_bound_of_the_full_divergence(teacher, logits):
    log_s = logits.detach().log_softmax(-1)
    bounds = [sparse_forward_kl(log_s, stored(teacher, k), gradient=False)[0] for k in (1, 4, 11)]
    assert (bounds[0] <= bounds[1] + 1e-12).all()
    assert (bounds[1] <= bounds[2] + 1e-12).all()


def test_mass_leaked_out_of_the_stored_tokens_is_charged():
    # Proportions inside the two stored tokens agree, but the student puts half of its mass outside.
    target = SparseTarget(torch.tensor([[0, 1]]), torch.tensor([[0.6, 0.3]]), torch.tensor([0.1]))
    log_s = torch.tensor([[0.3333333, 0.1666667, 0.25, 0.25]]).log()
    value, slope = sparse_forward_kl(log_s, target, gradient=True)
    assert_close(value, torch.tensor([0.9 * 0.5877867 - 0.1 * 1.6094379]), rtol=1e-5, atol=1e-6)
    assert (slope[0, :2] < 0).all()
    assert (slope[0, 2:] > 0).all()


def test_a_student_that_is_sure_leaves_no_rest_to_cancel():
    # 1 − Σ s is 0 in float32 here; the logarithm of what is left is −100 nevertheless.
    logits = torch.tensor([[100.0, 0.0]], requires_grad=True)
    target = SparseTarget(torch.tensor([[0]]), torch.tensor([[0.9]]), torch.tensor([0.1]))
    value, slope = sparse_forward_kl(logits.detach().log_softmax(-1), target, gradient=True)
    assert_close(value, torch.tensor([10.0 - 0.325083]))
    assert_close(slope, torch.tensor([[0.1, -0.1]]))


def test_unused_places_and_covered_vocabularies():
    log_s = torch.randn(1, 3).log_softmax(-1)
    padded = SparseTarget(torch.tensor([[2, -1]]), torch.tensor([[0.7, 0.9]]), torch.tensor([0.3]))
    exact = SparseTarget(torch.tensor([[2]]), torch.tensor([[0.7]]), torch.tensor([0.3]))
    for x, y in zip(
        sparse_forward_kl(log_s, padded, gradient=True),
        sparse_forward_kl(log_s, exact, gradient=True),
        strict=True,
    ):
        assert_close(x, y)
    assert_close(padded.entropy(torch.float32), exact.entropy(torch.float32))
    everything = SparseTarget(torch.tensor([[0, 1, 2]]), log_s.exp(), torch.tensor([1e-7]))
    value, slope = sparse_forward_kl(log_s, everything, gradient=True)
    assert_close(value, torch.zeros(1), rtol=0, atol=1e-6)
    assert_close(slope, torch.zeros(1, 3), rtol=0, atol=1e-6)


def test_ids_of_32_bits(teacher, logits):
    wide = stored(teacher, 3)
    narrow = SparseTarget(wide.ids.int(), wide.probabilities, wide.tail)
    weight = torch.eye(11, dtype=torch.float64)
    found, wanted = (vocabulary_losses(logits, weight, target) for target in (narrow, wide))
    assert_close(found.total, wanted.total)
    assert_close(found.per_token.agreement, wanted.per_token.agreement)


def test_metrics(teacher, logits):
    target = stored(teacher, 3)
    scores = vocabulary_losses(
        logits.detach(), torch.eye(11, dtype=torch.float64), target
    ).per_token
    outcomes = torch.cat([target.probabilities, target.tail[:, None]], 1)
    entropy = -(outcomes * outcomes.log()).sum(-1)
    assert_close(scores.teacher_entropy, entropy)
    assert scores.agreement.tolist() == (logits.argmax(-1) == teacher.argmax(-1)).double().tolist()


@pytest.mark.parametrize(
    ("ids", "probabilities", "tail", "message"),
    [
        (torch.zeros(2), torch.zeros(2), torch.zeros(2), r"ids are whole numbers \[N, K\]"),
        (torch.zeros(2, 3).long(), torch.zeros(2, 4), torch.zeros(2), "probabilities are"),
        (torch.zeros(2, 3).long(), torch.zeros(2, 3), torch.zeros(3), "tail is"),
    ],
)
def test_shapes_are_checked(ids, probabilities, tail, message):
    with pytest.raises(ValueError, match=message):
        SparseTarget(ids, probabilities, tail)


@pytest.mark.parametrize("labels", [None, torch.tensor([0, 3, -100, 10, 2, -100, 6])])
def test_samples_and_a_pool_are_one_distribution(teacher, labels):
    """Ids, and a pool over other ids: the dense divergence from the distribution they make."""
    hidden = torch.randn(7, 3, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(12, 3, dtype=torch.float64, requires_grad=True)  # one row of padding
    probabilities, ids = teacher.topk(3)
    mass = 1 - probabilities.sum(-1)
    shape = torch.rand(11, dtype=torch.float64)
    shape = shape / shape.sum()
    target = SparseTarget(ids, probabilities, None, pool=(shape, mass))
    q = torch.zeros(7, 12, dtype=torch.float64).scatter(1, ids, probabilities)
    q[:, :11] += mass[:, None] * shape
    log_s = (hidden @ weight.t()).log_softmax(-1)
    found = vocabulary_losses(hidden, weight, target, labels=labels)
    stored = torch.xlogy(probabilities, probabilities).sum() + torch.xlogy(mass, mass).sum()
    stored = stored + mass.sum() * torch.xlogy(shape, shape).sum()
    assert_close(found.divergence, stored - (q * log_s).sum())
    gradients = torch.autograd.grad(found.divergence, (hidden, weight), retain_graph=True)
    assert_close(gradients, torch.autograd.grad(-(q * log_s).sum(), (hidden, weight)))
    known = SparseTarget(ids, probabilities, None, torch.full((7,), 2.0), (shape, mass))
    value = vocabulary_losses(hidden, weight, known, labels=labels)
    assert_close(value.divergence, -14.0 - (q * log_s).sum())
    assert_close(value.per_token.teacher_entropy, torch.full((7,), 2.0, dtype=torch.float64))
    assert_close(known[2:4].pool[1], mass[2:4])


def test_a_pool_beside_a_tail_is_refused(teacher):
    probabilities, ids = teacher.topk(3)
    with pytest.raises(ValueError, match="without a tail"):
        SparseTarget(ids, probabilities, probabilities[:, 0], pool=(teacher[0], teacher[:, 0]))
