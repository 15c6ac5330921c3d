"""Vocabulary losses of every backend against a naive float64 oracle: values and gradients."""

from __future__ import annotations

import os
from importlib.util import find_spec

import pytest
import torch
from torch.nn.functional import cross_entropy, pad
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from dominie.losses import Head, prediction_divergence, tiles, vocabulary_losses
from dominie.losses.divergence import KINDS

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")
# The interpreter subtracts infinities in lanes that are thrown away.
quiet = pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
BACKENDS = ["torch", pytest.param("triton", marks=[needs_triton, quiet])]
SIZES = [(37, 37), (37, 41), (41, 37)]
"""Vocabularies of student and teacher."""

PLAIN = {}
CAPPED = {"softcap": 4.0}
SCALED = {"scale": 0.4, "with_bias": True}
GEMMA_AND_COHERE = {"scale": 1.7, "softcap": 3.0, "with_bias": True}


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """Several tiles for a few tokens, and several blocks for a tile."""
    monkeypatch.setattr(tiles, "_CPU_TILE_ELEMENTS", 16 * 41)
    monkeypatch.setattr("dominie.losses.scoring._CPU_BLOCK_ELEMENTS", 5 * 41)


class Problem:
    """Random arguments, made in float64 and rounded to ``dtype``, and what the oracle says."""

    def __init__(
        self,
        tokens=23,
        sizes=(37, 37),
        width=8,
        *,
        scale=1.0,
        softcap=None,
        with_bias=False,
        dtype=torch.float32,
        seed=0,
    ):
        generator = torch.Generator().manual_seed(seed)

        def random(*shape):
            return torch.randn(*shape, generator=generator, dtype=torch.float64).to(DEVICE, dtype)

        self.hidden = random(tokens, width).requires_grad_()
        self.weight = random(sizes[0], width).requires_grad_()
        self.bias = random(sizes[0]).requires_grad_() if with_bias else None
        self.head = Head(self.weight, self.bias, scale, softcap)
        self.teacher = random(tokens, width + 3), Head(random(sizes[1], width + 3), softcap=5.0)
        self.labels = torch.randint(sizes[0], (tokens,), generator=generator).to(DEVICE)
        self.labels[::4] = -100
        self.divergence_weights = random(tokens).abs()
        self.label_weights = random(tokens).abs()

    @property
    def leaves(self):
        return [leaf for leaf in (self.hidden, self.weight, self.bias) if leaf is not None]

    def losses(self, **options):
        return vocabulary_losses(
            self.hidden,
            self.head,
            self.teacher,
            labels=self.labels,
            divergence_weights=self.divergence_weights,
            label_weights=self.label_weights,
            **options,
        )

    def oracle(self, **options):
        """Σ of both terms and the leaves to differentiate, in float64."""
        leaves = [leaf.detach().double().requires_grad_() for leaf in self.leaves]
        student = logits(
            Head(*leaves[1:], scale=self.head.scale, softcap=self.head.softcap), leaves[0]
        )
        teacher = logits(self.teacher[1], self.teacher[0])
        divergence = naive_divergence(student, teacher, **options)
        token_loss = cross_entropy(student, self.labels, reduction="none", ignore_index=-100)
        return (
            self.divergence_weights.double() @ divergence,
            self.label_weights.double() @ token_loss,
            leaves,
        )


def logits(head, hidden):
    """The definition, in float64."""
    bias = 0 if head.bias is None else head.bias.double()
    product = head.scale * (hidden.double() @ head.weight.double().t() + bias)
    return product if head.softcap is None else head.softcap * (product / head.softcap).tanh()


def naive_divergence(student, teacher, kind="forward_kl", temperature=1.0, beta=0.5):
    """The definition with probabilities instead of logarithms."""
    shared = min(student.shape[1], teacher.shape[1])
    size = max(student.shape[1], teacher.shape[1])

    def probabilities(z, support=None):
        p = (z[:, :support] / temperature).softmax(-1)
        return pad(p, (0, size - p.shape[1]))

    def kl(p, q):
        ratio = torch.where(p > 0, p, 1.0) / torch.where(p > 0, q, 1.0)
        return (p * ratio.log()).sum(-1)

    if kind == "forward_kl":
        value = kl(probabilities(teacher, shared), probabilities(student))
    elif kind == "reverse_kl":
        value = kl(probabilities(student, shared), probabilities(teacher))
    else:
        s, t = probabilities(student), probabilities(teacher)
        m = beta * t + (1 - beta) * s
        value = kl(t, m) if kind == "skewed_kl" else beta * kl(t, m) + (1 - beta) * kl(s, m)
    return temperature**2 * value


def assert_matches_oracle(problem, backend, tolerance, **options):
    losses = problem.losses(backend=backend, **options)
    divergence, next_token, leaves = problem.oracle(**options)
    assert_close(losses.divergence.double(), divergence, **tolerance)
    assert_close(losses.next_token.double(), next_token, **tolerance)
    gradients = torch.autograd.grad(losses.total, problem.leaves)
    expected = torch.autograd.grad(divergence + next_token, leaves)
    for found, wanted in zip(gradients, expected, strict=True):
        assert_close(found.double(), wanted, **tolerance)


FLOAT32 = {
    "rtol": 2e-5,
    "atol": 5e-5,
}  # sums of 23 tokens' O(1) terms, a few float32 roundings each
FLOAT64 = {"rtol": 1e-10, "atol": 1e-11}


def test_known_number():
    # Teacher (3/4, 1/4), student (1/2, 1/2): KL(t ‖ s) = 3/4·ln(3/2) + 1/4·ln(1/2).
    teacher = torch.tensor([[3.0, 1.0]]).log()
    loss = prediction_divergence(torch.zeros(1, 2), torch.eye(2), teacher, torch.eye(2))
    assert_close(loss, torch.tensor(0.13081203594113694))


@pytest.mark.parametrize("head", [PLAIN, CAPPED, SCALED, GEMMA_AND_COHERE])
@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("kind", KINDS)
def test_torch_matches_oracle(kind, temperature, sizes, head):
    options = {"kind": kind, "temperature": temperature, "beta": 0.3}
    assert_matches_oracle(Problem(sizes=sizes, **head), "torch", FLOAT32, **options)
    exact = Problem(sizes=sizes, dtype=torch.float64, **head)
    assert_matches_oracle(exact, "torch", FLOAT64, **options)


@needs_triton
@quiet
@pytest.mark.parametrize(("temperature", "head"), [(1.0, SCALED), (2.5, CAPPED)])
@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("kind", KINDS)
def test_triton_matches_oracle(kind, temperature, sizes, head):
    problem = Problem(tokens=4, sizes=sizes, **head)
    options = {"kind": kind, "temperature": temperature, "beta": 0.3}
    assert_matches_oracle(problem, "triton", FLOAT32, **options)


@needs_triton
@quiet
def test_triton_matches_oracle_over_several_blocks_of_the_vocabulary():
    problem = Problem(tokens=2, sizes=(4099, 4101), width=3)
    assert_matches_oracle(problem, "triton", FLOAT32, kind="jsd", temperature=2.0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_labels_alone_are_cross_entropy(backend):
    problem = Problem(tokens=5, **CAPPED)
    losses = vocabulary_losses(
        problem.hidden, problem.head, labels=problem.labels, backend=backend, temperature=3.0
    )
    wanted = cross_entropy(logits(problem.head, problem.hidden), problem.labels, reduction="sum")
    assert_close(losses.next_token.double(), wanted, **FLOAT32)
    assert losses.divergence == 0
    for found, expected in zip(
        torch.autograd.grad(losses.total, problem.leaves),
        torch.autograd.grad(wanted, problem.leaves),
        strict=True,
    ):
        assert_close(found, expected, **FLOAT32)


@pytest.mark.parametrize("backend", BACKENDS)
def test_metrics_by_token(backend):
    problem = Problem(tokens=5, sizes=(37, 41))
    scores = problem.losses(backend=backend, temperature=2.0).per_token
    student, teacher = (
        logits(h, x) for h, x in ((problem.head, problem.hidden), problem.teacher[::-1])
    )
    t = (teacher / 2).softmax(-1)
    wanted = cross_entropy(student, problem.labels, reduction="none", ignore_index=-100)
    assert_close(
        scores.divergence.double(), naive_divergence(student, teacher, temperature=2.0), **FLOAT32
    )
    assert_close(scores.next_token.double(), wanted, **FLOAT32)
    assert_close(scores.teacher_entropy.double(), -(t * t.log()).sum(-1), **FLOAT32)
    assert scores.agreement.tolist() == (student.argmax(-1) == teacher.argmax(-1)).double().tolist()
    assert not any(getattr(scores, name).requires_grad for name in scores.__dataclass_fields__)


def test_what_is_not_asked_for_is_not_computed():
    problem = Problem(tokens=3)
    labels_only = vocabulary_losses(problem.hidden, problem.weight, labels=problem.labels).per_token
    assert labels_only.divergence is labels_only.teacher_entropy is labels_only.agreement is None
    target_only = vocabulary_losses(problem.hidden, problem.weight, problem.teacher, metrics=False)
    assert target_only.per_token.next_token is target_only.per_token.agreement is None


@pytest.mark.parametrize("kind", KINDS)
def test_numeric_gradients_of_both_terms(kind):
    problem = Problem(tokens=3, sizes=(5, 6), width=2, dtype=torch.float64, **GEMMA_AND_COHERE)

    def both(hidden, weight, bias):
        head = Head(weight, bias, problem.head.scale, problem.head.softcap)
        losses = vocabulary_losses(
            hidden, head, problem.teacher, labels=problem.labels, kind=kind, temperature=1.5
        )
        return losses.divergence, losses.next_token

    assert torch.autograd.gradcheck(both, problem.leaves)


@pytest.mark.parametrize("coefficients", [(1, 1), (-2, -2), (0.3, 2.0), (1, 0), (0, 1)])
def test_any_combination_of_the_terms_is_differentiated(coefficients):
    problem = Problem(**SCALED)
    a, b = coefficients
    losses = problem.losses()
    divergence, next_token, leaves = problem.oracle()
    found = torch.autograd.grad(a * losses.divergence + b * losses.next_token, problem.leaves)
    wanted = torch.autograd.grad(a * divergence + b * next_token, leaves)
    for x, y in zip(found, wanted, strict=True):
        assert_close(x.double(), y, **FLOAT32)


def test_a_term_that_was_not_asked_for_has_no_gradient():
    problem = Problem()
    losses = vocabulary_losses(problem.hidden, problem.weight, problem.teacher)
    gradients = torch.autograd.grad(losses.next_token, problem.leaves, allow_unused=True)
    assert gradients == (None, None)


def test_one_pass_serves_both_terms(monkeypatch):
    passes = []
    whole = tiles.scores_and_gradients
    monkeypatch.setattr(
        "dominie.losses.vocabulary.scores_and_gradients",
        lambda *arguments: passes.append(1) or whole(*arguments),
    )
    problem = Problem()
    (0.5 * problem.losses().total).backward()
    losses = problem.losses()
    (0.5 * losses.divergence + 0.5 * losses.next_token).backward()
    assert len(passes) == 2
    losses = problem.losses()
    losses.divergence.backward()
    assert len(passes) == 4


def test_a_retained_graph_is_differentiated_again():
    problem = Problem()
    loss = 2 * problem.losses().total
    first = torch.autograd.grad(loss, problem.leaves, retain_graph=True)
    second = torch.autograd.grad(loss, problem.leaves)
    for x, y in zip(first, second, strict=True):
        assert_close(x, y)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(loss, problem.leaves)


def test_masking_equals_deleting():
    masked, kept = Problem(), torch.arange(23, device=DEVICE) % 3 != 0
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
    for x, y in zip(
        torch.autograd.grad(losses.total, masked.leaves),
        torch.autograd.grad(deleted.total, masked.leaves),
        strict=True,
    ):
        assert_close(x, y, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rows", [1, 16, 1000])
def test_tiles_do_not_change_the_result(rows, monkeypatch):
    whole = Problem(tokens=50, dtype=torch.float64)
    expected = whole.losses()
    monkeypatch.setattr(tiles, "_rows_per_tile", lambda *_: rows)
    losses = whole.losses()
    assert_close(losses.total, expected.total)
    for x, y in zip(
        torch.autograd.grad(losses.total, whole.leaves),
        torch.autograd.grad(expected.total, whole.leaves),
        strict=True,
    ):
        assert_close(x, y)


def test_no_tensor_is_larger_than_a_tile_or_the_head(monkeypatch):
    monkeypatch.setattr(tiles, "_CPU_TILE_ELEMENTS", 16 * 300)

    class Largest(TorchDispatchMode):
        elements = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            for tensor in result if isinstance(result, (tuple, list)) else [result]:
                if isinstance(tensor, torch.Tensor):
                    Largest.elements = max(Largest.elements, tensor.numel())
            return result

    problem = Problem(tokens=200, sizes=(300, 300), width=16)
    with Largest():
        problem.losses(backend="torch").total.backward()
    assert Largest.elements == 300 * 19  # the teacher's head; all logits would be 60,000


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", KINDS)
def test_extreme_logits_stay_finite(kind, backend):
    problem = Problem(tokens=3)
    problem.head = Head(problem.weight, scale=1e6)
    losses = problem.losses(kind=kind, backend=backend)
    values = losses.total, *torch.autograd.grad(losses.total, problem.leaves)
    assert all(value.isfinite().all() for value in values)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", KINDS)
def test_no_tokens_give_a_zero_with_zero_gradients(kind, backend):
    problem = Problem(tokens=0, **SCALED)
    losses = problem.losses(kind=kind, backend=backend)
    assert losses.total == 0
    losses.total.backward()
    assert all(leaf.grad is not None and not leaf.grad.any() for leaf in problem.leaves)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_student_that_is_its_teacher_has_nothing_to_learn(kind, backend):
    problem = Problem(tokens=3)
    target = problem.hidden.detach(), problem.weight.detach()
    losses = vocabulary_losses(problem.hidden, problem.weight, target, kind=kind, backend=backend)
    assert_close(losses.divergence, torch.zeros_like(losses.divergence), rtol=0, atol=1e-5)
    assert losses.per_token.agreement.tolist() == [1, 1, 1]
    for gradient in torch.autograd.grad(losses.divergence, [problem.hidden, problem.weight]):
        assert_close(gradient, torch.zeros_like(gradient), rtol=0, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_strides_do_not_matter(backend):
    problem = Problem(tokens=4)
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
    for x, y in zip(
        torch.autograd.grad(losses.total, problem.leaves),
        torch.autograd.grad(expected.total, problem.leaves),
        strict=True,
    ):
        assert_close(x, y)


def test_tied_embeddings_add_both_gradients():
    problem = Problem(dtype=torch.float64)
    table = problem.weight
    ids = torch.arange(23, device=DEVICE)
    losses = vocabulary_losses(table[ids].tanh(), table, problem.teacher, labels=problem.labels)
    z = logits(Head(table), table[ids].tanh())
    wanted = naive_divergence(z, logits(problem.teacher[1], problem.teacher[0])).sum()
    wanted = wanted + cross_entropy(z, problem.labels, reduction="sum")
    found, expected = (torch.autograd.grad(loss, table)[0] for loss in (losses.total, wanted))
    assert_close(found, expected, **FLOAT64)


def test_a_head_with_an_adapter():
    problem = Problem(dtype=torch.float64)
    a, b = (
        torch.randn(*shape, dtype=torch.float64, device=DEVICE, requires_grad=True)
        for shape in ((2, 8), (37, 2))
    )
    merged = problem.weight.detach() + b @ a
    loss = vocabulary_losses(problem.hidden, merged, problem.teacher).total
    wanted = naive_divergence(
        logits(Head(problem.weight.detach() + b @ a), problem.hidden),
        logits(problem.teacher[1], problem.teacher[0]),
    ).sum()
    for x, y in zip(
        torch.autograd.grad(loss, [a, b]), torch.autograd.grad(wanted, [a, b]), strict=True
    ):
        assert_close(x, y, **FLOAT64)


def test_a_frozen_head_costs_no_product(monkeypatch):
    def refuse(*_):
        raise AssertionError("the gradient of a frozen head was computed")

    problem = Problem()
    expected = torch.autograd.grad(problem.losses().total, problem.hidden)[0]
    monkeypatch.setattr(tiles, "add_product", refuse)
    problem.weight.requires_grad_(False)
    assert_close(torch.autograd.grad(problem.losses().total, problem.hidden)[0], expected)


def test_a_head_is_trained_on_hidden_states_without_gradient():
    problem = Problem()
    expected = torch.autograd.grad(problem.losses().total, problem.weight)[0]
    problem.hidden = problem.hidden.detach()
    assert_close(torch.autograd.grad(problem.losses().total, problem.weight)[0], expected)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_nothing_is_differentiated_without_grad(mode, monkeypatch):
    monkeypatch.setattr(tiles, "_add_tile", None)
    problem = Problem()
    with mode():
        losses = problem.losses()
    assert not losses.total.requires_grad
    assert_close(losses.total.double(), sum(problem.oracle()[:2]).detach(), **FLOAT32)


def test_a_checkpoint_recomputes_the_same_gradients():
    problem = Problem()
    expected = torch.autograd.grad(problem.losses().total, problem.leaves)

    def loss(hidden):
        problem.hidden = hidden * 1
        return problem.losses().total

    leaves = problem.leaves
    total = checkpoint(loss, leaves[0], use_reentrant=False)
    for x, y in zip(torch.autograd.grad(total, leaves), expected, strict=True):
        assert_close(x, y)


@pytest.mark.parametrize("kind", KINDS)
def test_bfloat16_parameters(kind):
    problem = Problem(dtype=torch.bfloat16)
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


def test_autocast_narrows_the_products_and_not_the_gradients():
    problem = Problem()
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


def test_prediction_divergence_is_the_divergence():
    problem = Problem()
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
