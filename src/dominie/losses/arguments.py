"""Checks the arguments of the vocabulary losses and chooses their backend; whether Triton runs."""

from __future__ import annotations

import math
import os
from importlib.util import find_spec
from typing import TYPE_CHECKING

import torch

from dominie.losses import divergence as scoring
from dominie.losses.divergence import (
    IGNORED,
    KINDS,
    LABEL_KINDS,
    MIXTURES,
    Kind,
    LabelKind,
    Terms,
    ValuesT,
    Weighted,
)
from dominie.losses.heads import Head, as_head
from dominie.losses.targets import DenseTarget, SparseTarget
from dominie.losses.tiles import Problem, sum_precision

if TYPE_CHECKING:
    from torch import Tensor

    from dominie.losses.tiles import Scorer

BACKENDS = ("auto", "torch", "triton")


def scorer(backend: str, device: torch.device, precision: torch.dtype, *, sparse: bool) -> Scorer:
    """The scorer of a backend.

    A sparse target is scored in torch by every backend: K stored tokens leave no tile to fuse.

    Args:
        backend: "torch", "triton", or "auto", Triton on a GPU and torch elsewhere.
        device: where the logits are. Triton runs on a CPU under ``TRITON_INTERPRET=1`` alone.
        precision: of the logits.
        sparse: whether the target is.

    Raises:
        ValueError: the backend is unknown, or cannot run here.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend is one of {', '.join(BACKENDS)}, found {backend!r}")
    obstacle = obstacle_to_triton(device, precision)
    if backend == "triton" and obstacle is not None:
        raise ValueError(f"backend triton cannot run here: {obstacle}")
    if backend == "torch" or sparse or (backend == "auto" and (obstacle or device.type == "cpu")):
        return scoring.score
    from dominie.losses import triton_vocabulary as vocabulary

    return vocabulary.score


def obstacle_to_triton(device: torch.device, precision: torch.dtype) -> str | None:
    """Why a kernel cannot run on a device in a precision; None if it can."""
    if find_spec("triton") is None:
        return "triton is not installed (pip install 'dominie[triton]')"
    if device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        return f"the tensors are on {device}, it needs a GPU (or TRITON_INTERPRET=1)"
    if precision == torch.float64:
        return "it computes in float32, not float64"
    return None


def checked_problem(
    hidden: Tensor,
    head: Head,
    target: tuple[Tensor, Head | Tensor] | DenseTarget | SparseTarget | None,
    *,
    labels: Tensor | None,
    divergence_weights: Tensor | None,
    label_weights: Tensor | None,
    temperature: float,
    kind: Kind,
    beta: float,
    label_kind: LabelKind,
    backend: str,
    metrics: bool,
    check_finite: bool,
) -> Problem:
    """The arguments of :func:`dominie.losses.vocabulary_losses`, or a ValueError."""
    _check_formula(kind, beta, temperature, label_kind)
    _check_states("hidden", hidden, head)
    if target is None and labels is None:
        raise ValueError("neither a target nor labels: there is no loss to compute")
    compared = _checked_target(target, hidden, kind)
    labels = _checked_labels(labels, hidden)
    if check_finite:
        _check_values(hidden, head, compared, labels)
    precision = product_precision(hidden, head)
    sums = sum_precision(precision)
    trainable = (hidden, head.weight, head.bias)
    return Problem(
        target=_weighted("divergence_weights", divergence_weights, compared, hidden, sums),
        labels=_weighted("label_weights", label_weights, labels, hidden, sums),
        scale=head.scale,
        terms=Terms(
            kind=kind,
            beta=beta,
            temperature=temperature,
            student_softcap=head.softcap,
            target_softcap=compared.head.softcap if isinstance(compared, DenseTarget) else None,
            gradient=torch.is_grad_enabled()
            and any(tensor is not None and tensor.requires_grad for tensor in trainable),
            metrics=metrics,
            label_kind=label_kind,
        ),
        precision=precision,
        scorer=scorer(backend, hidden.device, sums, sparse=isinstance(compared, SparseTarget)),
    )


def _check_formula(kind: Kind, beta: float, temperature: float, label_kind: LabelKind) -> None:
    if kind not in KINDS:
        raise ValueError(f"kind is one of {', '.join(KINDS)}, found {kind!r}")
    if label_kind not in LABEL_KINDS:
        raise ValueError(f"label_kind is one of {', '.join(LABEL_KINDS)}, found {label_kind!r}")
    if not (math.isfinite(temperature) and temperature > 0):
        raise ValueError(f"temperature is a finite number above 0, found {temperature}")
    if kind in MIXTURES and not 0 < beta < 1:
        raise ValueError(f"beta of {kind} is between 0 and 1, both excluded, found {beta}")


def _check_states(name: str, hidden: Tensor, head: Head) -> None:
    if hidden.ndim != 2 or not hidden.is_floating_point():
        raise ValueError(
            f"{name} is a floating-point [N, D], found {hidden.dtype} {list(hidden.shape)}"
        )
    if hidden.shape[1] != head.width:
        raise ValueError(
            f"{name} has width {hidden.shape[1]}, its head's weight {list(head.weight.shape)} "
            f"expects {head.width}"
        )
    if hidden.device != head.weight.device:
        raise ValueError(
            f"{name} is on {hidden.device}, its head on {head.weight.device}: move one of them"
        )


def _checked_target(
    target: tuple[Tensor, Head | Tensor] | DenseTarget | SparseTarget | None,
    hidden: Tensor,
    kind: Kind,
) -> DenseTarget | SparseTarget | None:
    if target is None:
        return None
    if isinstance(target, SparseTarget):
        if kind != "forward_kl":
            raise ValueError(f"a sparse target has no {kind}: only forward_kl is defined on it")
        compared: DenseTarget | SparseTarget = target
    else:
        states, head = target if isinstance(target, tuple) else (target.hidden, target.head)
        compared = DenseTarget(states.detach(), as_head(head).constant())
        _check_states("the target's hidden", compared.hidden, compared.head)
    if len(compared) != len(hidden):
        raise ValueError(f"the target has {len(compared)} tokens, hidden has {len(hidden)}")
    if compared.device != hidden.device:
        raise ValueError(f"the target is on {compared.device}, hidden on {hidden.device}")
    return compared


def _checked_labels(labels: Tensor | None, hidden: Tensor) -> Tensor | None:
    if labels is None:
        return None
    if labels.shape != hidden.shape[:1] or labels.dtype != torch.int64:
        raise ValueError(
            f"labels are int64 [N] = [{len(hidden)}], found {labels.dtype} {list(labels.shape)}"
        )
    if labels.device != hidden.device:
        raise ValueError(f"labels are on {labels.device}, hidden on {hidden.device}")
    return labels.contiguous()


def _check_values(
    hidden: Tensor, head: Head, target: DenseTarget | SparseTarget | None, labels: Tensor | None
) -> None:
    """Refuse what only the values show. Every test is queued before the first is read."""
    size = head.vocabulary_size
    faults = {"hidden has values that are not finite": ~hidden.isfinite().all()}
    if isinstance(target, DenseTarget):
        finite = target.hidden.isfinite().all()
        faults["the target's hidden has values that are not finite"] = ~finite
    if isinstance(target, SparseTarget):
        faults[f"the sparse target has ids outside [0, {size})"] = (target.ids >= size).any()
        finite = target.probabilities.isfinite().all()
        for values in (target.tail, target.teacher_entropy, *(target.pool or ())):
            finite = finite if values is None else finite & values.isfinite().all()
        faults["the sparse target has probabilities that are not finite"] = ~finite
    if labels is not None:
        outside = (labels >= size) | ((labels < 0) & (labels != IGNORED))
        faults[f"labels are in [0, {size}) or {IGNORED}, found another"] = outside.any()
    for fault, is_found in zip(faults, torch.stack(list(faults.values())).tolist(), strict=True):
        if is_found:
            raise ValueError(fault)


def _weighted(
    name: str, weights: Tensor | None, values: ValuesT | None, hidden: Tensor, dtype: torch.dtype
) -> Weighted[ValuesT] | None:
    """A term with its coefficients, ones unless given; None where the term is not asked for."""
    if values is None:
        if weights is not None:
            raise ValueError(f"{name} are given, but nothing for them to weight")
        return None
    if weights is None:
        return Weighted(values, hidden.new_ones(len(hidden), dtype=dtype))
    if weights.shape != hidden.shape[:1]:
        raise ValueError(f"{name} are [N] = [{len(hidden)}], found {list(weights.shape)}")
    return Weighted(values, weights.detach().to(hidden.device, dtype).contiguous())


def product_precision(hidden: Tensor, head: Head) -> torch.dtype:
    """Autocast's where it is on, as for any linear layer; else the weight's own."""
    device = hidden.device.type
    if torch.is_autocast_enabled(device) and head.weight.dtype != torch.float64:
        return torch.get_autocast_dtype(device)
    return head.weight.dtype
