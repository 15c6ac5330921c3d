"""Divergences between two categorical distributions, with their gradients.

Every function takes log-probabilities, the student's [n, V_s] and the teacher's [n, V_t], and
returns the divergence [n] and its gradient with respect to the student's *logits* [n, V_s]: for
F(s) with s = softmax(z), ∂F/∂z = s · (f − Σ s·f) where f = ∂F/∂s. With ``gradient=False`` the
second result is None. The arguments are left as they were.

Where one vocabulary is a prefix of the other, a token that only one side has is a logit of −inf
on the other. In KL(a ‖ b) that is infinite where a has a token and b has not; there a is taken
over b's tokens alone and renormalised. The mixtures hold both supports and need no such step.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Literal, TypeAlias, get_args

import torch
from torch.linalg import vecdot

if TYPE_CHECKING:
    from torch import Tensor

Kind: TypeAlias = Literal["forward_kl", "reverse_kl", "jsd", "skewed_kl"]
KINDS: tuple[Kind, ...] = get_args(Kind)
MIXTURES: tuple[Kind, ...] = ("jsd", "skewed_kl")
"""The kinds in which ``beta``, the teacher's part of the mixture, has a meaning."""


def divergence_and_slope(
    kind: Kind, log_s: Tensor, log_t: Tensor, *, beta: float, gradient: bool
) -> tuple[Tensor, Tensor | None]:
    """The divergence of that kind, and its gradient or None; ``beta`` is a mixture's."""
    match kind:
        case "forward_kl":
            return forward_kl(log_s, log_t, gradient=gradient)
        case "reverse_kl":
            return reverse_kl(log_s, log_t, gradient=gradient)
        case "jsd":
            return jsd(log_s, log_t, beta, gradient=gradient)
        case "skewed_kl":
            return skewed_kl(log_s, log_t, beta, gradient=gradient)


def forward_kl(log_s: Tensor, log_t: Tensor, *, gradient: bool) -> tuple[Tensor, Tensor | None]:
    """KL(t ‖ s): knowledge distillation, arXiv 1503.02531."""
    shared = min(log_s.shape[-1], log_t.shape[-1])
    log_t = _over_first(shared, log_t)
    t = log_t.exp()
    value = vecdot(t, log_t - log_s[:, :shared])
    if not gradient:
        return value, None
    slope = log_s.exp()
    slope[:, :shared] -= t
    return value, slope


def reverse_kl(log_s: Tensor, log_t: Tensor, *, gradient: bool) -> tuple[Tensor, Tensor | None]:
    """KL(s ‖ t): MiniLLM, arXiv 2306.08543."""
    shared, extra = min(log_s.shape[-1], log_t.shape[-1]), log_s.shape[-1] - log_t.shape[-1]
    log_s = _over_first(shared, log_s)
    s, log_ratio = log_s.exp(), log_s - log_t[:, :shared]
    value = vecdot(s, log_ratio)
    if not gradient:
        return value, None
    slope = log_ratio.sub_(value[:, None]).mul_(s)
    return value, torch.nn.functional.pad(slope, (0, extra)) if extra > 0 else slope


def jsd(
    log_s: Tensor, log_t: Tensor, beta: float, *, gradient: bool
) -> tuple[Tensor, Tensor | None]:
    """β·KL(t ‖ m) + (1−β)·KL(s ‖ m) with m = β·t + (1−β)·s: GKD, arXiv 2306.13649."""
    shared = min(log_s.shape[-1], log_t.shape[-1])
    log_m = _log_mixture(log_s[:, :shared], log_t[:, :shared], beta)
    s, t = log_s.exp(), log_t.exp()
    # Of a token that the teacher lacks, m = (1−β)·s; of one that the student lacks, m = β·t.
    log_ratio = torch.full_like(log_s, -math.log1p(-beta))
    torch.sub(log_s[:, :shared], log_m, out=log_ratio[:, :shared])
    student_term = vecdot(s, log_ratio)
    teacher_term = vecdot(t[:, :shared], log_t[:, :shared] - log_m)
    teacher_term -= math.log(beta) * t[:, shared:].sum(-1)
    value = beta * teacher_term + (1 - beta) * student_term
    if not gradient:
        return value, None
    # f = (1−β)·log(s/m): what the logarithms' insides add to it cancels.
    return value, log_ratio.sub_(student_term[:, None]).mul_(s).mul_(1 - beta)


def skewed_kl(
    log_s: Tensor, log_t: Tensor, beta: float, *, gradient: bool
) -> tuple[Tensor, Tensor | None]:
    """KL(t ‖ m) with m = β·t + (1−β)·s: DistiLLM, arXiv 2402.03898."""
    shared = min(log_s.shape[-1], log_t.shape[-1])
    log_ratio = log_t[:, :shared] - _log_mixture(log_s[:, :shared], log_t[:, :shared], beta)
    t = log_t.exp()
    value = vecdot(t[:, :shared], log_ratio) - math.log(beta) * t[:, shared:].sum(-1)
    if not gradient:
        return value, None
    # f = −(1−β)·t/m, so −s·f is the part of t that the mixture owes to s.
    owed = log_ratio.add_(log_s[:, :shared]).add_(math.log1p(-beta)).exp_()
    slope = log_s.exp().mul_(owed.sum(-1, keepdim=True))
    slope[:, :shared] -= owed
    return value, slope


def _over_first(size: int, log_p: Tensor) -> Tensor:
    """The log-probabilities given that the outcome is one of the first ``size``."""
    return log_p if size == log_p.shape[-1] else log_p[:, :size].log_softmax(-1)


def _log_mixture(log_s: Tensor, log_t: Tensor, beta: float) -> Tensor:
    """log(β·t + (1−β)·s), without leaving the logarithms: the smallest masses survive."""
    return torch.logaddexp(log_t + math.log(beta), log_s + math.log1p(-beta))
