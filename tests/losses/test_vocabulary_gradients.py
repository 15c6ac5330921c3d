"""The gradients of the vocabulary losses: every way to ask for them, and what they cost."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import cross_entropy
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from dominie.losses import Head, tiles, vocabulary_losses
from dominie.losses.divergence import KINDS

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CAPPED = {"softcap": 4.0}
SCALED = {"scale": 0.4, "with_bias": True}
GEMMA_AND_COHERE = {"scale": 1.7, "softcap": 3.0, "with_bias": True}

# Sums of 23 tokens, each of order one and a few float32 roundings away.
FLOAT32 = {"rtol": 2e-5, "atol": 5e-5}
FLOAT64 = {"rtol": 1e-10, "atol": 1e-11}


pytestmark = pytest.mark.usefixtures("small_tiles")


def assert_same_gradients(loss, expected, leaves, **tolerance):
    for found, wanted in zip(
        torch.autograd.grad(loss, leaves), torch.autograd.grad(expected, leaves), strict=True
    ):
        assert_close(found, wanted, **tolerance)


@pytest.mark.parametrize("kind", KINDS)
def test_numeric_gradients_of_both_terms(make_problem, kind):
    problem = make_problem(tokens=3, sizes=(5, 6), width=2, dtype=torch.float64, **GEMMA_AND_COHERE)

    def both(hidden, weight, bias):
        head = Head(weight, bias, problem.head.scale, problem.head.softcap)
        losses = vocabulary_losses(
            hidden, head, problem.teacher, labels=problem.labels, kind=kind, temperature=1.5
        )
        return losses.divergence, losses.next_token

    assert torch.autograd.gradcheck(both, problem.leaves)


@pytest.mark.parametrize("coefficients", [(1, 1), (-2, -2), (0.3, 2.0), (1, 0), (0, 1)])
def test_any_combination_of_the_terms_is_differentiated(make_problem, coefficients):
    problem = make_problem(**SCALED)
    a, b = coefficients
    losses = problem.losses()
    divergence, next_token, leaves = problem.oracle()
    found = torch.autograd.grad(a * losses.divergence + b * losses.next_token, problem.leaves)
    wanted = torch.autograd.grad(a * divergence + b * next_token, leaves)
    for x, y in zip(found, wanted, strict=True):
        assert_close(x.double(), y, **FLOAT32)


def test_a_term_that_was_not_asked_for_has_no_gradient(make_problem):
    problem = make_problem()
    losses = vocabulary_losses(problem.hidden, problem.weight, problem.teacher)
    gradients = torch.autograd.grad(losses.next_token, problem.leaves, allow_unused=True)
    assert gradients == (None, None)


def test_one_pass_serves_both_terms(make_problem, monkeypatch):
    passes = []
    whole = tiles.scores_and_gradients
    monkeypatch.setattr(
        "dominie.losses.vocabulary.scores_and_gradients",
        lambda *arguments: passes.append(1) or whole(*arguments),
    )
    problem = make_problem()
    (0.5 * problem.losses().total).backward()
    losses = problem.losses()
    (0.5 * losses.divergence + 0.5 * losses.next_token).backward()
    assert len(passes) == 2
    losses = problem.losses()
    losses.divergence.backward()
    assert len(passes) == 4


def test_a_retained_graph_is_differentiated_again(make_problem):
    problem = make_problem()
    loss = 2 * problem.losses().total
    first = torch.autograd.grad(loss, problem.leaves, retain_graph=True)
    second = torch.autograd.grad(loss, problem.leaves)
    for x, y in zip(first, second, strict=True):
        assert_close(x, y)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(loss, problem.leaves)


@pytest.mark.parametrize("rows", [1, 16, 1000])
def test_tiles_do_not_change_the_result(make_problem, rows, monkeypatch):
    whole = make_problem(tokens=50, dtype=torch.float64)
    expected = whole.losses()
    monkeypatch.setattr(tiles, "rows_per_tile", lambda *_: rows)
    losses = whole.losses()
    assert_close(losses.total, expected.total)
    assert_same_gradients(losses.total, expected.total, whole.leaves)


def test_no_tensor_is_larger_than_a_tile_or_the_head(make_problem, monkeypatch):
    monkeypatch.setattr(tiles, "tile_elements", lambda _: 16 * 300)

    class Largest(TorchDispatchMode):
        elements = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            for tensor in result if isinstance(result, (tuple, list)) else [result]:
                if isinstance(tensor, torch.Tensor):
                    Largest.elements = max(Largest.elements, tensor.numel())
            return result

    problem = make_problem(tokens=200, sizes=(300, 300), width=16)
    with Largest():
        problem.losses(backend="torch").total.backward()
    assert Largest.elements == 300 * 19  # the teacher's head; all logits would be 60,000


def test_tied_embeddings_add_both_gradients(make_problem):
    problem = make_problem(dtype=torch.float64)
    table = problem.weight
    ids = torch.arange(23, device=DEVICE)
    losses = vocabulary_losses(table[ids].tanh(), table, problem.teacher, labels=problem.labels)
    z = make_problem.logits(Head(table), table[ids].tanh())
    wanted = make_problem.naive_divergence(
        z, make_problem.logits(problem.teacher[1], problem.teacher[0])
    ).sum()
    wanted = wanted + cross_entropy(z, problem.labels, reduction="sum")
    found, expected = (torch.autograd.grad(loss, table)[0] for loss in (losses.total, wanted))
    assert_close(found, expected, **FLOAT64)


def test_a_head_with_an_adapter(make_problem):
    problem = make_problem(dtype=torch.float64)
    a, b = (
        torch.randn(*shape, dtype=torch.float64, device=DEVICE, requires_grad=True)
        for shape in ((2, 8), (37, 2))
    )
    merged = problem.weight.detach() + b @ a
    loss = vocabulary_losses(problem.hidden, merged, problem.teacher).total
    wanted = make_problem.naive_divergence(
        make_problem.logits(Head(problem.weight.detach() + b @ a), problem.hidden),
        make_problem.logits(problem.teacher[1], problem.teacher[0]),
    ).sum()
    for x, y in zip(
        torch.autograd.grad(loss, [a, b]), torch.autograd.grad(wanted, [a, b]), strict=True
    ):
        assert_close(x, y, **FLOAT64)


def test_a_frozen_head_costs_no_product(make_problem, monkeypatch):
    def refuse(*_):
        raise AssertionError("the gradient of a frozen head was computed")

    problem = make_problem()
    expected = torch.autograd.grad(problem.losses().total, problem.hidden)[0]
    monkeypatch.setattr(tiles, "add_product", refuse)
    problem.weight.requires_grad_(False)
    assert_close(torch.autograd.grad(problem.losses().total, problem.hidden)[0], expected)


def test_a_head_is_trained_on_hidden_states_without_gradient(make_problem):
    problem = make_problem()
    expected = torch.autograd.grad(problem.losses().total, problem.weight)[0]
    problem.hidden = problem.hidden.detach()
    assert_close(torch.autograd.grad(problem.losses().total, problem.weight)[0], expected)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_nothing_is_differentiated_without_grad(make_problem, mode, monkeypatch):
    monkeypatch.setattr(tiles, "_add_tile", None)
    problem = make_problem()
    with mode():
        losses = problem.losses()
    assert not losses.total.requires_grad
    assert_close(losses.total.double(), sum(problem.oracle()[:2]).detach(), **FLOAT32)


def test_a_checkpoint_recomputes_the_same_gradients(make_problem):
    problem = make_problem()
    expected = torch.autograd.grad(problem.losses().total, problem.leaves)

    def loss(hidden):
        problem.hidden = hidden * 1
        return problem.losses().total

    leaves = problem.leaves
    total = checkpoint(loss, leaves[0], use_reentrant=False)
    for x, y in zip(torch.autograd.grad(total, leaves), expected, strict=True):
        assert_close(x, y)
