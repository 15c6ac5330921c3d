"""Losses over the vocabulary that never hold the logits of more than a tile of tokens.

The logits of a batch, [N, V], are the largest tensor of a training step. Here they are made a
tile of tokens at a time, scored, turned in place into their own gradient and multiplied back,
all in the forward pass. Backward only scales what was kept: the gradients of hidden and head.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

import torch
from torch.autograd.function import once_differentiable

from dominie.losses.arguments import checked_problem
from dominie.losses.divergence import PerToken, ValuesT, Weighted
from dominie.losses.heads import Head, as_head
from dominie.losses.targets import DenseTarget, SparseTarget
from dominie.losses.tiles import Problem, scores_and_gradients, sum_precision

if TYPE_CHECKING:
    from torch import Tensor

    from dominie.losses.divergence import Kind, LabelKind

__all__ = ["Head", "SparseTarget", "VocabularyLosses", "prediction_divergence", "vocabulary_losses"]


@dataclass(frozen=True, eq=False)
class VocabularyLosses:
    """Weighted sums over the tokens, in nats.

    Train on ``total``, with the coefficients of the two terms in the weights: any other
    combination of the two is differentiated as well, but by a second pass in backward.

    Attributes:
        divergence: scalar Σ w·T²·D(target, student); 0 without a target.
        next_token: scalar Σ w·factor·(−log s(label)); 0 without labels. The factor is 1 but for
            the kinds of ``label_kind`` that have one.
        per_token: what the sums are made of, and metrics; detached.
    """

    divergence: Tensor
    next_token: Tensor
    per_token: PerToken

    @property
    def total(self) -> Tensor:
        """The sum of both terms."""
        return self.divergence + self.next_token


def vocabulary_losses(
    hidden: Tensor,
    head: Head | Tensor,
    target: tuple[Tensor, Head | Tensor] | DenseTarget | SparseTarget | None = None,
    *,
    labels: Tensor | None = None,
    divergence_weights: Tensor | None = None,
    label_weights: Tensor | None = None,
    temperature: float = 1.0,
    kind: Kind = "forward_kl",
    beta: float = 0.5,
    backend: str = "auto",
    metrics: bool = True,
    check_finite: bool = True,
    label_kind: LabelKind = "cross_entropy",
) -> VocabularyLosses:
    """Divergence from a teacher and next-token loss in one pass over the student's logits.

    Args:
        hidden: [N, D] states of the positions that are trained, no others.
        head: the student's, a :class:`Head` or a bare weight [V, D].
        target: the teacher's (hidden [N, D_t], head), a constant, as a pair or a
            :class:`DenseTarget`; or a :class:`SparseTarget`.
            Where one vocabulary is longer, its further rows are taken for padding: the other
            side's logits of them count as −inf. Ids must otherwise mean the same tokens
            (:meth:`Head.reordered`).
        labels: [N] ids of the next tokens; −100 where there is no next-token term.
        divergence_weights: [N] coefficients of the divergence; ones unless given.
        label_weights: [N] coefficients of the next-token term; ones unless given.
        temperature: T > 0 of the divergence, whose value and gradient carry T².
        kind: "forward_kl" KL(t ‖ s), "reverse_kl" KL(s ‖ t), "jsd" β·KL(t ‖ m) + (1−β)·KL(s ‖ m)
            or "skewed_kl" KL(t ‖ m), with m = β·t + (1−β)·s.
        beta: 0 < β < 1, the teacher's part of m.
        backend: "torch", "triton", or "auto": Triton where it runs and the target is dense.
        metrics: whether to fill ``per_token.teacher_entropy`` and ``agreement``.
        check_finite: whether to look for non-finite hidden states and ids out of range first,
            for which a GPU is waited for once.
        label_kind: what a token's −log s(label) is multiplied by, as a constant: "cross_entropy"
            nothing, "dft" s(label) (arXiv 2508.05629), "eaft" the entropy of the student's 20
            likeliest tokens, renormalised, over 3 nats (2601.02151).

    Returns:
        Sums, not means: whoever steps divides by the tokens of the whole optimiser step. Without
        tokens they are 0, with zero gradients.

    Raises:
        ValueError: arguments that do not fit together or are not finite, named.
    """
    head = as_head(head)
    problem = checked_problem(
        hidden,
        head,
        target,
        labels=labels,
        divergence_weights=divergence_weights,
        label_weights=label_weights,
        temperature=temperature,
        kind=kind,
        beta=beta,
        label_kind=label_kind,
        backend=backend,
        metrics=metrics,
        check_finite=check_finite,
    )
    divergence, next_token, *per_token = _VocabularyLosses.apply(  # type: ignore[no-untyped-call]
        hidden, head.weight, head.bias, problem
    )
    return VocabularyLosses(divergence, next_token, PerToken(*per_token))


def prediction_divergence(
    student_hidden: Tensor,
    student_head: Head | Tensor,
    teacher_hidden: Tensor,
    teacher_head: Head | Tensor,
    *,
    weights: Tensor | None = None,
    temperature: float = 1.0,
    kind: Kind = "forward_kl",
    beta: float = 0.5,
    backend: str = "auto",
) -> Tensor:
    """Scalar Σ_n weights[n] · T² · D_n of a teacher's prediction and a student's.

    Args:
        student_hidden: [N, D_s].
        student_head: a :class:`Head` or a bare weight [V, D_s].
        teacher_hidden: [N, D_t], a constant.
        teacher_head: a :class:`Head` or a bare weight [V_t, D_t], a constant.
        weights: [N]; ones unless given.
        temperature: as all that follows, see :func:`vocabulary_losses`.
        kind: the divergence D.
        beta: the teacher's part of a mixture.
        backend: "torch", "triton" or "auto".

    Raises:
        ValueError: arguments that do not fit together or are not finite, named.
    """
    return vocabulary_losses(
        student_hidden,
        student_head,
        (teacher_hidden, teacher_head),
        divergence_weights=weights,
        temperature=temperature,
        kind=kind,
        beta=beta,
        backend=backend,
        metrics=False,
    ).divergence


class _VocabularyLosses(torch.autograd.Function):
    """Both sums. The gradients kept are those of their plain sum: one buffer serves both terms.

    Upstream gradients that differ, and a second backward through a retained graph, are answered
    by another pass with the upstream gradients in the weights.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, problem: Problem
    ) -> tuple[Tensor | None, ...]:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(hidden, weight, bias)
        ctx.problem = problem
        ctx.wanted = [needed and problem.terms.gradient for needed in ctx.needs_input_grad[:3]]
        scores, ctx.gradients = scores_and_gradients(hidden, weight, bias, problem, ctx.wanted)
        values = [getattr(scores, field.name) for field in fields(scores)]
        ctx.mark_non_differentiable(*(value for value in values if value is not None))
        return (
            _weighted_sum(problem.target, scores.divergence, problem, hidden),
            _weighted_sum(problem.labels, _factored(scores), problem, hidden),
            *values,
        )

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, divergence: Tensor | None, next_token: Tensor | None, *_: None
    ) -> tuple[Tensor | None, ...]:
        hidden, weight, bias = ctx.saved_tensors
        problem: Problem = ctx.problem
        divergence = None if problem.target is None else divergence
        next_token = None if problem.labels is None else next_token
        if divergence is None and next_token is None:
            return None, None, None, None
        gradients, ctx.gradients = ctx.gradients, None
        factor = _common_factor(problem, divergence, next_token)
        if factor is None or gradients is None:
            factor = None
            problem = _with_upstream(problem, divergence, next_token)
            gradients = scores_and_gradients(hidden, weight, bias, problem, ctx.wanted)[1]
        return (
            _scaled(gradients.hidden, factor, hidden.dtype),
            _scaled(gradients.weight, factor, weight.dtype),
            _scaled(gradients.bias, factor, weight.dtype if bias is None else bias.dtype),
            None,
        )


def _factored(scores: PerToken) -> Tensor | None:
    """The next-token term of every token, with the factor of its kind."""
    if scores.next_token is None or scores.label_factor is None:
        return scores.next_token
    return scores.next_token * scores.label_factor


def _weighted_sum(
    term: Weighted[Any] | None, values: Tensor | None, problem: Problem, like: Tensor
) -> Tensor:
    if term is None or values is None:
        return like.new_zeros((), dtype=sum_precision(problem.precision))
    return torch.dot(term.weights, values)


def _common_factor(
    problem: Problem, divergence: Tensor | None, next_token: Tensor | None
) -> Tensor | None:
    """The upstream gradient of every term that was computed, or None if they differ."""
    if problem.target is None or problem.labels is None:
        return next_token if divergence is None else divergence
    if divergence is None or next_token is None:
        return None
    # The gradient of a plain sum is one tensor, seen without waiting for a GPU.
    same = divergence is next_token or torch.equal(divergence, next_token)
    return divergence if same else None


def _with_upstream(
    problem: Problem, divergence: Tensor | None, next_token: Tensor | None
) -> Problem:
    """The problem whose plain sum has the gradient asked for."""
    return replace(
        problem,
        target=_times(problem.target, divergence),
        labels=_times(problem.labels, next_token),
        terms=replace(problem.terms, metrics=False),
    )


def _times(term: Weighted[ValuesT] | None, factor: Tensor | None) -> Weighted[ValuesT] | None:
    """The term times ``factor``; no term at all where there is no factor."""
    if term is None or factor is None:
        return None
    return replace(term, weights=term.weights * factor)


def _scaled(gradient: Tensor | None, factor: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """``factor · gradient`` in the parameter's precision, in one pass over the gradient."""
    if gradient is None:
        return None
    # A GPU would have to be waited for to see that the factor is 1; there it is multiplied by it.
    if factor is None or (factor.device.type == "cpu" and factor.item() == 1):
        return gradient.to(dtype)
    out = gradient if gradient.dtype == dtype else torch.empty_like(gradient, dtype=dtype)
    return torch.mul(gradient, factor, out=out)
