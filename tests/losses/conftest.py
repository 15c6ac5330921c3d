"""A small problem for the vocabulary losses, and what a naive float64 oracle says of it."""

from __future__ import annotations

import os
from importlib.util import find_spec

import pytest
import torch
from torch.nn.functional import cross_entropy, pad

from dominie.losses import Head, divergence, tiles, vocabulary_losses

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

NEEDS_TRITON = pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")
# The interpreter subtracts infinities in lanes that are thrown away.
QUIET = pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")


@pytest.fixture(params=["torch", pytest.param("triton", marks=[NEEDS_TRITON, QUIET])])
def backend(request):
    """Of the vocabulary losses."""
    return request.param


@pytest.fixture
def small_tiles(monkeypatch):
    """Several tiles for a few tokens, and several blocks for a tile, on every device."""
    monkeypatch.setattr(tiles, "tile_elements", lambda device: 16 * 41)
    monkeypatch.setattr(divergence, "block_elements", lambda device: 5 * 41)


@pytest.fixture
def make_problem():
    """The class below: test modules cannot import one another."""
    return Problem


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
        student = Problem.logits(
            Head(*leaves[1:], scale=self.head.scale, softcap=self.head.softcap), leaves[0]
        )
        teacher = Problem.logits(self.teacher[1], self.teacher[0])
        divergence = Problem.naive_divergence(student, teacher, **options)
        token_loss = cross_entropy(student, self.labels, reduction="none", ignore_index=-100)
        return (
            self.divergence_weights.double() @ divergence,
            self.label_weights.double() @ token_loss,
            leaves,
        )

    @staticmethod
    def logits(head, hidden):
        """The definition, in float64."""
        bias = 0 if head.bias is None else head.bias.double()
        product = head.scale * (hidden.double() @ head.weight.double().t() + bias)
        return product if head.softcap is None else head.softcap * (product / head.softcap).tanh()

    @staticmethod
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
