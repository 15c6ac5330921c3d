"""The kinds of the next-token term against a naive float64 oracle, and in a loss of sources."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import cross_entropy
from torch.testing import assert_close

from dominie.losses import SparseTarget, vocabulary_losses
from dominie.losses.divergence import LABEL_KINDS
from dominie.losses.forward_pass import ForwardPass
from dominie.losses.heads import Head
from dominie.losses.objective import Objective
from dominie.losses.targets import DenseTarget, Part, Signal
from dominie.losses.terms import LossTerms, NextToken, Prediction

pytestmark = pytest.mark.usefixtures("small_tiles")

FLOAT32 = {"rtol": 2e-5, "atol": 5e-5}
FLOAT64 = {"rtol": 1e-10, "atol": 1e-11}
FACTORED = [kind for kind in LABEL_KINDS if kind != "cross_entropy"]


def factor(kind, logits, labels):
    """[N] of the definitions, by probabilities, a constant."""
    p = logits.detach().softmax(-1)
    if kind == "cross_entropy":
        return torch.ones(len(p), dtype=p.dtype, device=p.device)
    if kind == "dft":
        return p.gather(1, labels.clamp(min=0)[:, None])[:, 0]
    top = p.sort(-1, descending=True).values[:, :20]
    top = top / top.sum(-1, keepdim=True)
    return -(top * top.log()).sum(-1) / 3.0


def oracle(problem, label_kind, **options):
    divergence, _, leaves = problem.oracle(**options)
    head = Head(*leaves[1:], scale=problem.head.scale, softcap=problem.head.softcap)
    logits = problem.logits(head, leaves[0])
    plain = cross_entropy(logits, problem.labels, reduction="none", ignore_index=-100)
    factors = factor(label_kind, logits, problem.labels)
    return divergence, problem.label_weights.double() @ (factors * plain), plain, leaves


@pytest.mark.parametrize(
    ("temperature", "head"), [(1.0, {"scale": 0.4, "with_bias": True}), (2.5, {"softcap": 4.0})]
)
@pytest.mark.parametrize("label_kind", LABEL_KINDS)
def test_values_and_gradients(make_problem, label_kind, head, temperature, backend):
    options = {"kind": "jsd", "temperature": temperature}
    exact = [(torch.float64, FLOAT64)] if backend == "torch" else []
    tokens = 19 if backend == "torch" or label_kind == "dft" else 4  # 19: two tiles
    for dtype, tolerance in [(torch.float32, FLOAT32), *exact]:
        problem = make_problem(tokens=tokens, sizes=(37, 41), dtype=dtype, **head)
        losses = problem.losses(label_kind=label_kind, backend=backend, **options)
        divergence, next_token, plain, leaves = oracle(problem, label_kind, **options)
        assert_close(losses.divergence.double(), divergence, **tolerance)
        assert_close(losses.next_token.double(), next_token, **tolerance)
        assert_close(losses.per_token.next_token.double(), plain.detach(), **tolerance)
        # Upstream factors that differ, so that backward scores the tokens a second time.
        found = torch.autograd.grad(losses.divergence + 2 * losses.next_token, problem.leaves)
        wanted = torch.autograd.grad(divergence + 2 * next_token, leaves)
        for x, y in zip(found, wanted, strict=True):
            assert_close(x.double(), y, **tolerance)


@pytest.mark.parametrize("label_kind", FACTORED)
@pytest.mark.parametrize("size", [5, 37])  # fewer tokens than EAFT's 20, and more
def test_labels_alone_and_beside_a_sparse_target(make_problem, label_kind, size, backend):
    problem = make_problem(tokens=23 if backend == "torch" else 4, sizes=(size, size))
    _, next_token, _, leaves = oracle(problem, label_kind)
    wanted = torch.autograd.grad(next_token, leaves)
    weighted = {"labels": problem.labels, "label_weights": problem.label_weights}
    ids = torch.zeros_like(problem.labels)[:, None]
    sparse = SparseTarget(ids, torch.full_like(ids, 0.5, dtype=torch.float32), ids[:, 0] + 0.5)
    nothing = torch.zeros_like(problem.label_weights)
    for target, others in [(None, {}), (sparse, {"divergence_weights": nothing})]:
        losses = vocabulary_losses(
            problem.hidden, problem.weight, target,
            label_kind=label_kind, backend=backend, **weighted, **others,
        )  # fmt: skip
        assert_close(losses.next_token.double(), next_token, **FLOAT32)
        found = torch.autograd.grad(losses.total, problem.leaves)
        for x, y in zip(found, wanted, strict=True):
            assert_close(x.double(), y, **FLOAT32)


def test_cross_entropy_is_as_without_a_kind(make_problem, backend):
    problem = make_problem(tokens=5, softcap=4.0)
    plain, named = (
        problem.losses(backend=backend, **kind) for kind in ({}, {"label_kind": "cross_entropy"})
    )
    assert named.per_token.label_factor is None
    assert torch.equal(plain.total, named.total)


def test_an_unknown_kind_is_refused(make_problem):
    with pytest.raises(ValueError, match="label_kind is one of cross_entropy, dft, eaft"):
        make_problem().losses(label_kind="sft")


@pytest.mark.parametrize("taught", [0, 1, 2])
def test_sources_have_kinds_of_their_own(make_problem, taught):
    """Three rows of three sources, of which the first ``taught`` have a teacher."""
    problem = make_problem(tokens=18, dtype=torch.float64)
    labels = problem.labels.view(3, 6)
    rows = torch.arange(3, device=labels.device)
    terms = [
        LossTerms(next_token=NextToken(weight=1.0, kind="dft"), prediction=Prediction(weight=0.1)),
        LossTerms(prediction=Prediction(kind="reverse_kl")),
        LossTerms(next_token=NextToken(weight=0.5, kind="eaft")),
    ]
    terms = terms[:taught] + [LossTerms(next_token=NextToken())] * (2 - taught) + terms[2:]
    states, head = problem.teacher
    kept = (labels >= 0).flatten()
    seen = kept & (rows[:, None] < taught).expand(3, 6).flatten()
    part = Part(rows[:taught], DenseTarget(states[seen], head))
    found = Objective(terms)(
        ForwardPass(
            hidden=problem.hidden.view(3, 6, -1),
            head=problem.head,
            labels=labels,
            source_ids=rows[:, None].expand(3, 6),
            signal=Signal((part,) if taught else ()),
        )
    )
    logits = problem.logits(problem.head, problem.hidden)
    teacher = problem.logits(head, states)
    plain = cross_entropy(logits, problem.labels, reduction="none", ignore_index=-100).view(3, 6)
    wanted = 0.5 * (factor("eaft", logits, problem.labels).view(3, 6) * plain)[2].sum()
    forward, reverse = (
        (problem.naive_divergence(logits, teacher, kind) * kept).view(3, 6)
        for kind in ("forward_kl", "reverse_kl")
    )
    if taught > 0:
        dft = factor("dft", logits, problem.labels).view(3, 6)
        wanted = wanted + (dft * plain)[0].sum() + 0.1 * forward[0].sum()
    if taught > 1:
        wanted = wanted + reverse[1].sum()
    wanted = wanted + plain[taught:2].sum()
    assert_close(found.total, wanted, **FLOAT64)
    logged = found.by_source[:, Objective(terms).columns.index("next_token")]
    assert_close(logged.double(), plain.sum(1).detach(), rtol=1e-6, atol=1e-6)
    gradients = torch.autograd.grad(found.total, problem.leaves)
    for x, y in zip(gradients, torch.autograd.grad(wanted, problem.leaves), strict=True):
        assert_close(x, y, **FLOAT64)


def test_a_source_without_labels_joins_the_pass_of_another(make_problem, monkeypatch):
    passes = []
    monkeypatch.setattr(
        "dominie.losses.terms.vocabulary_losses",
        lambda *found, **options: (
            passes.append(options["label_kind"]) or vocabulary_losses(*found, **options)
        ),
    )
    problem = make_problem(tokens=12)
    labels = problem.labels.view(2, 6)
    rows = torch.arange(2, device=labels.device)
    states, head = problem.teacher
    part = Part(rows, DenseTarget(states[(labels >= 0).flatten()], head))
    Objective([LossTerms(next_token=NextToken(kind="dft")), LossTerms(prediction=Prediction())])(
        ForwardPass(
            hidden=problem.hidden.view(2, 6, -1),
            head=problem.head,
            labels=labels,
            source_ids=rows[:, None].expand(2, 6),
            signal=Signal((part,)),
        )
    )
    assert passes == ["dft"]
