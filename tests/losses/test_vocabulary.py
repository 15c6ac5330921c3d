"""Vocabulary losses of every backend against a naive float64 oracle: values and gradients."""

from __future__ import annotations

from importlib.util import find_spec

import pytest
import torch
from torch.nn.functional import cross_entropy
from torch.testing import assert_close

from dominie.losses import Head, prediction_divergence, tiles, vocabulary_losses
from dominie.losses.divergence import KINDS

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NEEDS_TRITON = pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")
# The interpreter subtracts infinities in lanes that are thrown away.
QUIET = pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
SIZES = [(37, 37), (37, 41), (41, 37)]
"""Vocabularies of student and teacher."""

CAPPED = {"softcap": 4.0}
SCALED = {"scale": 0.4, "with_bias": True}
GEMMA_AND_COHERE = {"scale": 1.7, "softcap": 3.0, "with_bias": True}

# Sums of 23 tokens, each of order one and a few float32 roundings away.
FLOAT32 = {"rtol": 2e-5, "atol": 5e-5}
FLOAT64 = {"rtol": 1e-10, "atol": 1e-11}


pytestmark = pytest.mark.usefixtures("small_tiles")


def assert_matches_oracle(problem, backend, tolerance, **options):
    losses = problem.losses(backend=backend, **options)
    divergence, next_token, leaves = problem.oracle(**options)
    assert_close(losses.divergence.double(), divergence, **tolerance)
    assert_close(losses.next_token.double(), next_token, **tolerance)
    gradients = torch.autograd.grad(losses.total, problem.leaves)
    expected = torch.autograd.grad(divergence + next_token, leaves)
    for found, wanted in zip(gradients, expected, strict=True):
        assert_close(found.double(), wanted, **tolerance)


def assert_same_gradients(loss, expected, leaves, **tolerance):
    for found, wanted in zip(
        torch.autograd.grad(loss, leaves), torch.autograd.grad(expected, leaves), strict=True
    ):
        assert_close(found, wanted, **tolerance)


def test_small_tiles_are_several(make_problem, monkeypatch):
    heights = []
    monkeypatch.setattr(tiles, "_add_tile", lambda _, slope, *others: heights.append(len(slope)))
    make_problem().losses()
    assert heights == [12, 11]


def test_known_number():
    # Teacher (3/4, 1/4), student (1/2, 1/2): KL(t ‖ s) = 3/4·ln(3/2) + 1/4·ln(1/2).
    teacher = torch.tensor([[3.0, 1.0]]).log()
    loss = prediction_divergence(torch.zeros(1, 2), torch.eye(2), teacher, torch.eye(2))
    assert_close(loss, torch.tensor(0.13081203594113694))


@pytest.mark.parametrize("head", [{}, CAPPED, SCALED, GEMMA_AND_COHERE])
@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("kind", KINDS)
def test_torch_matches_oracle(make_problem, kind, temperature, sizes, head):
    options = {"kind": kind, "temperature": temperature, "beta": 0.3}
    assert_matches_oracle(make_problem(sizes=sizes, **head), "torch", FLOAT32, **options)
    exact = make_problem(sizes=sizes, dtype=torch.float64, **head)
    assert_matches_oracle(exact, "torch", FLOAT64, **options)


@NEEDS_TRITON
@QUIET
@pytest.mark.parametrize(("temperature", "head"), [(1.0, SCALED), (2.5, CAPPED)])
@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("kind", KINDS)
def test_triton_matches_oracle(make_problem, kind, temperature, sizes, head):
    problem = make_problem(tokens=4, sizes=sizes, **head)
    options = {"kind": kind, "temperature": temperature, "beta": 0.3}
    assert_matches_oracle(problem, "triton", FLOAT32, **options)


@NEEDS_TRITON
@QUIET
def test_triton_matches_oracle_over_several_blocks_of_the_vocabulary(make_problem):
    problem = make_problem(tokens=2, sizes=(4099, 4101), width=3)
    assert_matches_oracle(problem, "triton", FLOAT32, kind="jsd", temperature=2.0)


def test_labels_alone_are_cross_entropy(make_problem, backend):
    problem = make_problem(tokens=5, **CAPPED)
    losses = vocabulary_losses(
        problem.hidden, problem.head, labels=problem.labels, backend=backend, temperature=3.0
    )
    wanted = cross_entropy(
        make_problem.logits(problem.head, problem.hidden), problem.labels, reduction="sum"
    )
    assert_close(losses.next_token.double(), wanted, **FLOAT32)
    assert losses.divergence == 0
    assert_same_gradients(losses.total, wanted, problem.leaves, **FLOAT32)


def test_metrics_by_token(make_problem, backend):
    problem = make_problem(tokens=5, sizes=(37, 41))
    scores = problem.losses(backend=backend, temperature=2.0, label_kind="dft").per_token
    student = make_problem.logits(problem.head, problem.hidden)
    teacher = make_problem.logits(problem.teacher[1], problem.teacher[0])
    t = (teacher / 2).softmax(-1)
    wanted = cross_entropy(student, problem.labels, reduction="none", ignore_index=-100)
    assert_close(
        scores.divergence.double(),
        make_problem.naive_divergence(student, teacher, temperature=2.0),
        **FLOAT32,
    )
    assert_close(scores.next_token.double(), wanted, **FLOAT32)
    assert_close(scores.label_factor.double(), (-wanted).exp(), **FLOAT32)
    assert_close(scores.teacher_entropy.double(), -(t * t.log()).sum(-1), **FLOAT32)
    assert scores.agreement.tolist() == (student.argmax(-1) == teacher.argmax(-1)).double().tolist()
    assert not any(getattr(scores, name).requires_grad for name in scores.__dataclass_fields__)


def test_what_is_not_asked_for_is_not_computed(make_problem):
    problem = make_problem(tokens=3)
    labels_only = vocabulary_losses(problem.hidden, problem.weight, labels=problem.labels).per_token
    assert labels_only.divergence is labels_only.teacher_entropy is labels_only.agreement is None
    target_only = vocabulary_losses(problem.hidden, problem.weight, problem.teacher, metrics=False)
    assert target_only.per_token.next_token is target_only.per_token.agreement is None


def test_prediction_divergence_is_the_divergence(make_problem):
    problem = make_problem()
    loss = prediction_divergence(
        problem.hidden,
        problem.weight,
        *problem.teacher,
        weights=problem.divergence_weights,
        temperature=2.0,
        kind="jsd",
        beta=0.2,
    )
    losses = problem.losses(temperature=2.0, kind="jsd", beta=0.2)
    assert_close(loss, losses.divergence)


def test_masking_equals_deleting(make_problem):
    masked, kept = make_problem(), torch.arange(23, device=DEVICE) % 3 != 0
    masked.divergence_weights = masked.divergence_weights * kept
    masked.labels = masked.labels.masked_fill(~kept, -100)
    deleted = vocabulary_losses(
        masked.hidden[kept],
        masked.head,
        (masked.teacher[0][kept], masked.teacher[1]),
        labels=masked.labels[kept],
        divergence_weights=masked.divergence_weights[kept],
        label_weights=masked.label_weights[kept],
    )
    losses = masked.losses()
    assert_close(losses.divergence, deleted.divergence)
    assert_close(losses.next_token, deleted.next_token)
    assert_same_gradients(losses.total, deleted.total, masked.leaves, rtol=1e-5, atol=1e-5)


def test_strides_do_not_matter(make_problem, backend):
    problem = make_problem(tokens=4)
    expected = problem.losses(backend=backend)

    def strided(tensor):
        return tensor.repeat_interleave(2, dim=0)[::2]

    losses = vocabulary_losses(
        problem.hidden.t().contiguous().t(),
        problem.weight.t().contiguous().t(),
        (strided(problem.teacher[0]), problem.teacher[1]),
        labels=strided(problem.labels),
        divergence_weights=strided(problem.divergence_weights),
        label_weights=strided(problem.label_weights),
        backend=backend,
    )
    assert_close(losses.total, expected.total)
    assert_same_gradients(losses.total, expected.total, problem.leaves)


@pytest.mark.parametrize("kind", KINDS)
def test_extreme_logits_stay_finite(make_problem, kind, backend):
    problem = make_problem(tokens=3)
    problem.head = Head(problem.weight, scale=1e6)
    losses = problem.losses(kind=kind, backend=backend)
    values = losses.total, *torch.autograd.grad(losses.total, problem.leaves)
    assert all(value.isfinite().all() for value in values)


@pytest.mark.parametrize("kind", KINDS)
def test_no_tokens_give_a_zero_with_zero_gradients(make_problem, kind, backend):
    problem = make_problem(tokens=0, **SCALED)
    losses = problem.losses(kind=kind, backend=backend)
    assert losses.total == 0
    losses.total.backward()
    assert all(leaf.grad is not None and not leaf.grad.any() for leaf in problem.leaves)


@pytest.mark.parametrize("kind", KINDS)
def test_a_student_that_is_its_teacher_has_nothing_to_learn(make_problem, kind, backend):
    problem = make_problem(tokens=3)
    target = problem.hidden.detach(), problem.weight.detach()
    losses = vocabulary_losses(problem.hidden, problem.weight, target, kind=kind, backend=backend)
    assert_close(losses.divergence, torch.zeros_like(losses.divergence), rtol=0, atol=1e-5)
    assert losses.per_token.agreement.tolist() == [1, 1, 1]
    for gradient in torch.autograd.grad(losses.divergence, [problem.hidden, problem.weight]):
        assert_close(gradient, torch.zeros_like(gradient), rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_bfloat16_parameters(make_problem, kind):
    problem = make_problem(dtype=torch.bfloat16)
    losses = problem.losses(kind=kind)
    divergence, next_token, leaves = problem.oracle(kind=kind)
    assert losses.total.dtype == torch.float32
    # A CPU rounds the logits to bfloat16: 2⁻⁹ of values of about 8.
    assert_close(losses.total.double(), divergence + next_token, rtol=0.02, atol=0.02)
    found = torch.autograd.grad(losses.total, problem.leaves)
    wanted = torch.autograd.grad(divergence + next_token, leaves)
    for x, y in zip(found, wanted, strict=True):
        assert x.dtype == torch.bfloat16
        assert (x.double() - y).norm() < 0.02 * y.norm()


def test_autocast_narrows_the_products_and_not_the_gradients(make_problem):
    problem = make_problem()
    with torch.autocast(DEVICE, torch.bfloat16):
        total = problem.losses().total
    expected = problem.losses().total
    assert total != expected
    assert_close(total, expected, rtol=0.02, atol=0.02)
    for x, y in zip(
        torch.autograd.grad(total, problem.leaves),
        torch.autograd.grad(expected, problem.leaves),
        strict=True,
    ):
        assert x.dtype == torch.float32
        assert (x - y).norm() < 0.02 * y.norm()
