"""Divergences of next-token distributions; scores and gradients of a tile of logits."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Generic, Literal, TypeAlias, TypeVar, get_args

import torch
from torch.linalg import vecdot

from dominie.losses.targets import SparseTarget, sparse_forward_kl

if TYPE_CHECKING:
    from torch import Tensor

Kind: TypeAlias = Literal["forward_kl", "reverse_kl", "jsd", "skewed_kl"]
KINDS: tuple[Kind, ...] = get_args(Kind)
MIXTURES: tuple[Kind, ...] = ("jsd", "skewed_kl")
"""The kinds in which ``beta``, the teacher's part of the mixture, has a meaning."""

LabelKind: TypeAlias = Literal["cross_entropy", "dft", "eaft"]
LABEL_KINDS: tuple[LabelKind, ...] = get_args(LabelKind)


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


def normalised_entropy(logits: Tensor, softcap: float | None = None) -> Tensor:
    """[n] the entropy of the 20 likeliest tokens over 3 nats, of logits [n, V] before a soft-cap.

    The 20 are renormalised to sum to 1, and 3 stands for ln 20 = 2.9957, as in the authors' code.
    """
    top = logits.topk(min(20, logits.shape[-1]), dim=-1, sorted=False).values
    p = _softcapped(top, softcap).softmax(-1)
    return torch.xlogy(p, p).sum(-1) / -3.0


LABEL_FACTORS: dict[LabelKind, Callable[[Tensor, Tensor], Tensor]] = {
    "dft": lambda next_token, logits: next_token.neg().exp(),  # s(label): arXiv 2508.05629
    "eaft": lambda next_token, logits: normalised_entropy(logits),  # arXiv 2601.02151
}
"""By what the next-token loss of a token is multiplied, a constant: of that loss [n] itself, and
the logits [n, V] as they are compared. A kind that is not here has no factor."""

IGNORED = -100
"""The label of a position that no next-token term is wanted for; torch's own convention."""

ValuesT = TypeVar("ValuesT")


@dataclass(frozen=True)
class Terms:
    """What is asked of every row; ``gradient`` and ``metrics`` say what to compute beside it."""

    kind: Kind
    beta: float
    temperature: float
    student_softcap: float | None
    target_softcap: float | None
    gradient: bool
    metrics: bool
    label_kind: LabelKind = "cross_entropy"


@dataclass(frozen=True, eq=False)
class PerToken:
    """Values by position, detached [N] tensors in nats; None where not computed.

    Attributes:
        divergence: T² times the divergence of student and target.
        next_token: −log s(label) at temperature 1, whatever the term's kind; 0 where the label is
            ignored.
        teacher_entropy: the target's, at the loss's temperature. The tail of a sparse target
            counts as one outcome, so its figure is a lower bound.
        agreement: 1 where student and target hold the same token for the likeliest, else 0.
        label_factor: by which the kind of the next-token term multiplies ``next_token``; None for
            "cross_entropy".
    """

    divergence: Tensor | None = None
    next_token: Tensor | None = None
    teacher_entropy: Tensor | None = None
    agreement: Tensor | None = None
    label_factor: Tensor | None = None

    def __getitem__(self, rows: slice) -> PerToken:
        columns = (getattr(self, field.name) for field in fields(self))
        return PerToken(*(None if column is None else column[rows] for column in columns))


@dataclass(frozen=True, eq=False)
class Weighted(Generic[ValuesT]):
    """What one term of the loss is made from, and the coefficient [N] of every token in it."""

    values: ValuesT
    weights: Tensor


@dataclass(frozen=True, eq=False)
class Tile:
    """Some rows of the problem.

    Attributes:
        student: [n, V_s] logits before the soft-cap (scratch).
        slope: [n, V_s], written where a gradient is asked for: that of the weighted sum of both
            terms with respect to the logits. It may be ``student`` itself, or of another precision.
        target: [n, V_t] logits before the soft-cap (scratch), or a sparse target.
        labels: [n] ids of the next tokens.
        scores: [n] each; written. They are parts of the whole batch's, which is there from the
            start: results of their own, made between a tile's temporaries, would keep the
            memory of these from being used again.
    """

    student: Tensor
    slope: Tensor
    target: Weighted[Tensor | SparseTarget] | None
    labels: Weighted[Tensor] | None
    scores: PerToken


def block_elements(device: torch.device) -> int:
    """Elements of a block of logits: on a CPU it and its temporaries stay in cache."""
    return 1 << 19 if device.type == "cpu" else 1 << 25


def score(tile: Tile, terms: Terms) -> None:
    """Score a tile in blocks of rows, so that the element-wise passes find them in cache."""
    count, vocabulary = tile.student.shape
    step = max(1, block_elements(tile.student.device) // vocabulary)
    for start in range(0, count, step):
        _score_block(tile, slice(start, start + step), terms)


def _score_block(tile: Tile, rows: slice, terms: Terms) -> None:
    logits = _softcapped(tile.student[rows], terms.student_softcap)
    log_s = _log_probabilities(logits, terms.temperature)
    scores: dict[str, Tensor] = {}
    slope: Tensor | None = None
    if tile.target is not None:
        target, weights = tile.target.values[rows], tile.target.weights[rows]
        scores, slope = _divergence(log_s, target, weights, terms)
    if tile.labels is not None:
        labels, weights = tile.labels.values[rows], tile.labels.weights[rows]
        log_p = log_s if terms.temperature == 1 else logits.log_softmax(-1)
        kept = labels != IGNORED
        ids = labels.where(kept, torch.zeros_like(labels))[:, None]
        scores["next_token"] = value = -log_p.gather(1, ids)[:, 0] * kept
        weights = weights * kept
        if terms.label_kind in LABEL_FACTORS:
            factor = LABEL_FACTORS[terms.label_kind](value, logits)
            scores["label_factor"], weights = factor, weights * factor
        token_slope = _next_token_slope(log_p, ids, weights) if terms.gradient else None
        slope = token_slope if slope is None or token_slope is None else slope.add_(token_slope)
    if slope is not None:
        if terms.student_softcap is not None:
            slope *= 1 - (logits / terms.student_softcap).square_()
        tile.slope[rows].copy_(slope)
    for name, values in scores.items():
        getattr(tile.scores, name)[rows].copy_(values)


def _divergence(
    log_s: Tensor, target: Tensor | SparseTarget, weights: Tensor, terms: Terms
) -> tuple[dict[str, Tensor], Tensor | None]:
    """The scores that need a target, and the gradient of the weighted divergences."""
    scores: dict[str, Tensor] = {}
    if isinstance(target, SparseTarget):
        value, slope = sparse_forward_kl(log_s, target, gradient=terms.gradient)
        if terms.metrics:
            scores["teacher_entropy"], likeliest = target.entropy(log_s.dtype), target.likeliest()
    else:
        capped = _softcapped(target, terms.target_softcap)
        log_t = _log_probabilities(capped, terms.temperature)
        value, slope = divergence_and_slope(
            terms.kind, log_s, log_t, beta=terms.beta, gradient=terms.gradient
        )
        if terms.metrics:
            scores["teacher_entropy"], likeliest = -vecdot(log_t.exp(), log_t), log_t.argmax(-1)
    if terms.metrics:
        scores["agreement"] = (log_s.argmax(-1) == likeliest).to(log_s.dtype)
    scores["divergence"] = value * terms.temperature**2
    # T² of the definition, times the 1/T by which the logits were divided.
    return scores, slope if slope is None else slope.mul_(weights[:, None] * terms.temperature)


def _next_token_slope(log_p: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    """The gradient of Σ w·(−log p(id)); weights are [n], ids [n, 1]."""
    weights = weights[:, None]
    return log_p.exp().mul_(weights).scatter_add_(1, ids, -weights)


def _softcapped(logits: Tensor, cap: float | None) -> Tensor:
    """The logits after the soft-cap, in the same memory."""
    return logits if cap is None else logits.div_(cap).tanh_().mul_(cap)


def _log_probabilities(logits: Tensor, temperature: float) -> Tensor:
    return (logits if temperature == 1 else logits / temperature).log_softmax(-1)
