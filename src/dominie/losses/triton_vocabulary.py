"""From a tile of logits to its values and its gradient, in Triton: one program for each token.

A program reads the logits of its token twice (three times for kinds whose gradient needs their
value first) and writes the gradient, over them or in the precision of the products that follow;
nothing else of that size is read or written.
The arithmetic is that of :mod:`dominie.losses.divergence`, where it is explained.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from dominie.losses.divergence import IGNORED, KINDS, Terms, Tile, normalised_entropy
from dominie.losses.targets import SparseTarget

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
# ruff: noqa: N803 (capitals are constants of a compiled kernel)


# A multiple of the threads' vectors: were a logit held by two threads, one could read what the
# other has overwritten.
_BLOCK, _WARPS = 4096, 16
_FORWARD = tl.constexpr(KINDS.index("forward_kl"))
_REVERSE = tl.constexpr(KINDS.index("reverse_kl"))
_JSD = tl.constexpr(KINDS.index("jsd"))
_NOWHERE = tl.constexpr(2**31 - 1)


def score(tile: Tile, terms: Terms) -> None:
    """Score a tile of float32 logits whose target, if it has one, is dense."""
    student, target, labels, scores = tile.student, tile.target, tile.labels, tile.scores
    count, student_size = student.shape
    logits = student if target is None else target.values
    if isinstance(logits, SparseTarget):
        raise TypeError("there is no kernel for a sparse target")
    label_weights = student if labels is None else labels.weights
    if scores.label_factor is not None and terms.label_kind == "eaft":
        entropy = normalised_entropy(student, terms.student_softcap)
        label_weights = label_weights * scores.label_factor.copy_(entropy)
    outputs = (
        scores.divergence,
        scores.next_token,
        scores.teacher_entropy,
        scores.agreement,
        scores.label_factor,
    )
    with torch.cuda.device_of(student):
        _score_token[(count,)](
            student,
            tile.slope,
            logits,
            student if target is None else target.weights,
            student if labels is None else labels.values,
            label_weights,
            *(student if output is None else output for output in outputs),
            student_size,
            logits.shape[1],
            1 / terms.temperature,
            terms.student_softcap or 1.0,
            terms.target_softcap or 1.0,
            terms.beta,
            IGNORED,
            KIND=KINDS.index(terms.kind),
            TARGET=target is not None,
            LABELS=labels is not None,
            METRICS=scores.agreement is not None,
            LIKELIHOOD=terms.label_kind == "dft",
            GRADIENT=terms.gradient,
            TEMPERED=terms.temperature != 1,
            STUDENT_CAPPED=terms.student_softcap is not None,
            TARGET_CAPPED=terms.target_softcap is not None,
            RESTRICTED=student_size != logits.shape[1],
            WALKS=_walks(terms, has_target=target is not None),
            BLOCK=_BLOCK,
            num_warps=_WARPS,
        )


def _walks(terms: Terms, *, has_target: bool) -> int:
    """How often the logits are read after the normalisers: for the value, for the gradient."""
    value_comes_first = has_target and terms.kind != "forward_kl"
    return (2 if value_comes_first else 1) if terms.gradient else int(has_target)


@triton.jit
def _score_token(
    student,
    slopes,
    target,
    divergence_weights,
    labels,
    label_weights,
    divergences,
    next_tokens,
    entropies,
    agreements,
    label_factors,
    student_size,
    target_size,
    inverse_temperature,
    student_cap,
    target_cap,
    beta,
    ignored,
    KIND: tl.constexpr,
    TARGET: tl.constexpr,
    LABELS: tl.constexpr,
    METRICS: tl.constexpr,
    LIKELIHOOD: tl.constexpr,
    GRADIENT: tl.constexpr,
    TEMPERED: tl.constexpr,
    STUDENT_CAPPED: tl.constexpr,
    TARGET_CAPPED: tl.constexpr,
    RESTRICTED: tl.constexpr,
    WALKS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    student += token * student_size
    slopes += token * student_size
    target += token * target_size

    if LABELS:  # read before a thread that is ahead can write its gradient there
        label = tl.load(labels + token)
        label_weight = tl.where(label == ignored, 0.0, tl.load(label_weights + token))
        at_label = tl.where(label == ignored, 0, label)
        logit = _softcapped(tl.load(student + at_label), student_cap, STUDENT_CAPPED)

    norm_s, top_s = _normaliser(
        student, student_size, inverse_temperature, student_cap, STUDENT_CAPPED, BLOCK
    )
    if LABELS:
        log_total = norm_s
        if TEMPERED:
            log_total, _ = _normaliser(
                student, student_size, 1.0, student_cap, STUDENT_CAPPED, BLOCK
            )
        next_token = tl.where(label == ignored, 0.0, log_total - logit)
        tl.store(next_tokens + token, next_token)
        if LIKELIHOOD:
            tl.store(label_factors + token, tl.exp(-next_token))
            label_weight *= tl.exp(-next_token)

    support_s, support_t = student_size, target_size
    inner = -1.0  # Σ s·f, and of the forward KL always −Σ t
    if TARGET:
        norm_t, top_t = _normaliser(
            target, target_size, inverse_temperature, target_cap, TARGET_CAPPED, BLOCK
        )
        norm_entropy = norm_t
        if RESTRICTED:
            shared = tl.minimum(student_size, target_size)
            if KIND == _FORWARD:
                support_t = shared
                norm_t, _ = _normaliser(
                    target, shared, inverse_temperature, target_cap, TARGET_CAPPED, BLOCK
                )
            elif KIND == _REVERSE:
                support_s = shared
                norm_s, _ = _normaliser(
                    student, shared, inverse_temperature, student_cap, STUDENT_CAPPED, BLOCK
                )
        # T² of the definition, times the 1/T by which the logits are divided.
        weight = tl.load(divergence_weights + token) / inverse_temperature
        if METRICS:
            tl.store(agreements + token, tl.where(top_s == top_t, 1.0, 0.0))

    for walk in tl.static_range(WALKS):
        value = tl.zeros([BLOCK], tl.float32)
        pulls = tl.zeros([BLOCK], tl.float32)
        entropy = tl.zeros([BLOCK], tl.float32)
        for start in range(0, tl.maximum(student_size, target_size), BLOCK):
            columns = start + tl.arange(0, BLOCK)
            z = _logits(student, columns, student_size, student_cap, STUDENT_CAPPED)
            slope = tl.zeros([BLOCK], tl.float32)
            if TARGET:
                y = _logits(target, columns, target_size, target_cap, TARGET_CAPPED)
                log_s = tl.where(
                    columns < support_s, z * inverse_temperature - norm_s, -float("inf")
                )
                log_t = tl.where(
                    columns < support_t, y * inverse_temperature - norm_t, -float("inf")
                )
                part, pull = _value_and_pull(log_s, log_t, beta, KIND)
                slope = weight * (pull - tl.exp(log_s) * inner)
                if walk == 0:
                    value += part
                    pulls += pull
                    if METRICS:
                        log_p = y * inverse_temperature - norm_entropy
                        entropy -= _expected(log_p, log_p)
            if GRADIENT and walk == WALKS - 1:
                if LABELS:
                    hit = tl.where(columns == label, 1.0, 0.0)
                    slope += label_weight * (tl.exp(z - log_total) - hit)
                if STUDENT_CAPPED:
                    slope *= 1 - (z / student_cap) * (z / student_cap)
                tl.store(slopes + columns, slope, mask=columns < student_size)
        if TARGET and walk == 0:
            divergence = tl.sum(value, 0) / (inverse_temperature * inverse_temperature)
            tl.store(divergences + token, divergence)
            if METRICS:
                tl.store(entropies + token, tl.sum(entropy, 0))
            if KIND != _FORWARD:
                inner = tl.sum(pulls, 0)


@triton.jit
def _value_and_pull(log_s, log_t, beta, KIND: tl.constexpr):
    """Every token's part of the divergence, and its s·f with f = ∂F/∂s."""
    if KIND == _FORWARD:
        value = _expected(log_t, log_t - log_s)
        pull = -tl.exp(log_t)
    elif KIND == _REVERSE:
        value = _expected(log_s, log_s - log_t)
        pull = value
    else:
        a, b = log_t + tl.log(beta), log_s + tl.log(1 - beta)
        log_m = tl.maximum(a, b) + tl.log(1 + tl.exp(-tl.abs(a - b)))
        value = _expected(log_t, log_t - log_m)
        if KIND == _JSD:
            pull = (1 - beta) * _expected(log_s, log_s - log_m)
            value = beta * value + pull
        else:
            pull = tl.where(log_s > -float("inf"), -tl.exp(log_t + b - log_m), 0.0)
    return value, pull


@triton.jit
def _expected(log_p, of):
    """``p · of``, and 0 where p is 0 whatever the other may be."""
    return tl.where(log_p > -float("inf"), tl.exp(log_p) * of, 0.0)


@triton.jit
def _normaliser(pointer, size, inverse_temperature, cap, CAPPED: tl.constexpr, BLOCK: tl.constexpr):
    """The logits' log Σ exp(logits / T), and the first of the largest logits."""
    largest = tl.full([BLOCK], -float("inf"), tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    place = tl.zeros([BLOCK], tl.int32)
    for start in range(0, size, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        x = _logits(pointer, columns, size, cap, CAPPED) * inverse_temperature
        place = tl.where(x > largest, columns, place)
        updated = tl.maximum(largest, x)
        shift = tl.where(updated > -float("inf"), updated, 0.0)
        total = total * tl.exp(largest - shift) + tl.exp(x - shift)
        largest = updated
    highest = tl.max(largest, 0)
    norm = highest + tl.log(tl.sum(total * tl.exp(largest - highest), 0))
    return norm, tl.min(tl.where(largest == highest, place, _NOWHERE), 0)


@triton.jit
def _logits(pointer, columns, size, cap, CAPPED: tl.constexpr):
    """The logits after the soft-cap, −inf past the last."""
    x = tl.load(pointer + columns, mask=columns < size, other=0.0)
    return tl.where(columns < size, _softcapped(x, cap, CAPPED), -float("inf"))


@triton.jit
def _softcapped(x, cap, CAPPED: tl.constexpr):
    if CAPPED:
        x = cap * (2 * tl.sigmoid(2 * x / cap) - 1)
    return x
