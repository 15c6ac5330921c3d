"""Targets from a teacher with another tokenizer, and the likelihoods of whole spans of text.

Where tokens of both models end at the same byte, the teacher's next-token distribution is known in
the student's vocabulary. Inside a chunk that is several tokens of the student's no distribution is
known, and what both models make of the chunk is compared: is it written, or is it not? With p and
q its likelihoods under teacher and student and P = p^{1/τ}, Q = q^{1/τ}, the loss of a chunk is
KL((P, 1−P) ‖ (Q, 1−Q)): approximate likelihood matching (ALM, arXiv 2503.20083, equations 5 and 6).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple

import torch

from dominie.losses.arguments import product_precision
from dominie.losses.divergence import IGNORED
from dominie.losses.tiles import rows_per_tile, sum_precision, tile_elements
from dominie.losses.vocabulary import VocabularyLosses, vocabulary_losses

if TYPE_CHECKING:
    from torch import Tensor

    from dominie.losses.heads import Head
    from dominie.losses.targets import DenseTarget, SparseTarget

_LEAST = 1e-6
"""How near to 1, as a logarithm, P and Q are told apart."""


@dataclass(frozen=True, eq=False)
class SpanTarget:
    """What a teacher says in the student's vocabulary, as far as it can be said.

    Args:
        target: of n positions; what it holds where `weights` is 0 means nothing.
        weights: [n] 1 where the target is compared with, 0 where it is not.
        chunk: [n] number of the chunk that the next token of a position belongs to, if the chunk is
            compared by its likelihood; −1 elsewhere.
        after: [n] number of such a chunk, at the position that reads its last token; −1 elsewhere.
        log_teacher: [C] the teacher's log-likelihood of the tokens of each chunk, and that a
            boundary follows.
        boundary: [V_s] whether a token begins with a boundary.
    """

    target: DenseTarget | SparseTarget
    weights: Tensor
    chunk: Tensor
    after: Tensor
    log_teacher: Tensor
    boundary: Tensor

    def __len__(self) -> int:
        return len(self.weights)

    def __getitem__(self, rows: slice | Tensor) -> SpanTarget:
        return replace(
            self,
            target=self.target[rows],
            weights=self.weights[rows],
            chunk=self.chunk[rows],
            after=self.after[rows],
        )

    @property
    def device(self) -> torch.device:
        """Where the target is."""
        return self.weights.device

    @property
    def compared(self) -> Tensor:
        """[n] 1 where a position is compared with the teacher in either way."""
        return self.weights.maximum((self.chunk >= 0).to(self.weights.dtype))


class MappedPredictions:
    """One walk over the teacher's logits, a tile of positions at a time.

    Attributes:
        log_p: [U] log-probability of each next token.
        log_boundary: [U] that the next token begins with a boundary.
        ids: [D, K] tokens of the student, the likeliest and those of `known`; −1 in unused places.
        probabilities: [D, K].
        tail: [D] of all others, and of what has no token of the student.
    """

    def __init__(
        self,
        head: Head,
        tables: dict[str, Tensor],
        top: int,
        labels: Tensor,
        ranks: Tensor,
        known: Tensor,
    ) -> None:
        self._head, self._tables, self._labels = head, tables, labels
        self._ranks, self._known = ranks, known
        self._size = len(tables["fold"])
        self._top = min(top, self._size)
        dtype, count = sum_precision(head.weight.dtype), len(ranks)
        zeros = torch.zeros(len(labels), dtype=dtype, device=labels.device)
        self.log_p, self.log_boundary = zeros, zeros.clone()
        self.ids = known.new_full((count, self._top), -1)
        self.probabilities = zeros.new_zeros((count, self._top))
        self.tail = zeros.new_zeros(count)

    def run(self, states: Tensor) -> None:
        """Read everything from the states [U, D_t]; `ranks` ascend."""
        head, total = self._head, len(states)
        elements = tile_elements(states.device)
        step = rows_per_tile(total, head.vocabulary_size + self._size, elements)
        room = states.new_empty((step, head.vocabulary_size), dtype=self.log_p.dtype)
        found = torch.searchsorted(
            self._ranks, torch.arange(0, total + step, step, device=states.device)
        ).tolist()
        for number, start in enumerate(range(0, total, step)):
            place = slice(start, min(start + step, total))
            logits = room[: place.stop - start]
            head.write_logits(states[place].to(head.weight.dtype), out=logits)
            if head.softcap is not None:
                logits.div_(head.softcap).tanh_().mul_(head.softcap)
            p = torch.softmax(logits, -1, out=logits)
            tiny = torch.finfo(p.dtype).tiny
            chosen = p.gather(1, self._labels[place, None])[:, 0]
            self.log_p[place] = chosen.clamp_min(tiny).log()
            mass = p @ self._tables["boundary"].to(p.dtype)
            self.log_boundary[place] = mass.clamp(min=tiny, max=1.0).log()
            self._map(p, start, slice(found[number], found[number + 1]))

    def _map(self, p: Tensor, start: int, direct: slice) -> None:
        """Map the distributions [n, V_t] of a tile that are wanted."""
        if direct.start == direct.stop:
            return
        chosen, known = p[self._ranks[direct] - start], self._known[direct]
        longest = self._tables["map"]
        onto = longest.where(longest >= 0, self._size)  # the last column is of no token
        mapped = p.new_zeros((len(chosen), self._size + 1))
        mapped.scatter_add_(1, onto.expand(len(chosen), -1), chosen)
        wanted = mapped.scatter(1, known.where(known >= 0, self._size), 2.0)[:, : self._size]
        ranked, ids = wanted.topk(self._top)
        ids = ids.where(ranked > 0, -1)
        places = ids.where(ids >= 0, self._size)
        self.ids[direct] = ids
        self.probabilities[direct] = mapped.gather(1, places) * (ids >= 0)
        left = mapped[:, self._size].clone()
        self.tail[direct] = left + mapped.scatter(1, places, 0.0)[:, : self._size].sum(-1)


def span_losses(
    hidden: Tensor,
    head: Head,
    spans: SpanTarget,
    *,
    labels: Tensor,
    label_weights: Tensor,
    divergence_weights: Tensor,
    chunk_temperature: float,
    metrics: bool = True,
    check_finite: bool = True,
) -> VocabularyLosses:
    """`vocabulary_losses` for a teacher with another tokenizer; the divergence holds its chunks.

    Args:
        hidden: [N, D] states of the student.
        head: the student's.
        spans: what the teacher says of these positions.
        labels: [N] ids of the next tokens.
        label_weights: [N] coefficients of the next-token term.
        divergence_weights: [N] coefficients of what is compared with the teacher.
        chunk_temperature: τ of the likelihoods of chunks.
        metrics: as `vocabulary_losses`.
        check_finite: likewise.
    """
    chunks = matched_likelihoods(hidden, head, labels, spans, temperature=chunk_temperature)
    losses = vocabulary_losses(
        hidden,
        head,
        spans.target,
        labels=labels,
        label_weights=label_weights + chunks.label_weights * divergence_weights,
        divergence_weights=divergence_weights * spans.weights,
        metrics=metrics,
        check_finite=check_finite,
    )
    per_token = losses.per_token
    assert per_token.next_token is not None
    assert per_token.divergence is not None
    # The labels' sum has the gradient of the chunks too; its value is that of the labels alone.
    next_token = torch.dot(label_weights.to(per_token.next_token.dtype), per_token.next_token)
    value = torch.dot(divergence_weights.to(chunks.values.dtype), chunks.values)
    divergence = losses.divergence + losses.next_token - losses.next_token.detach() + value
    weights = spans.weights.to(per_token.divergence.dtype)
    return VocabularyLosses(
        divergence,
        next_token,
        replace(
            per_token,
            divergence=per_token.divergence * weights + chunks.values,
            **{
                name: None if (found := getattr(per_token, name)) is None else found * weights
                for name in ("teacher_entropy", "agreement")
            },
        ),
    )


class Matched(NamedTuple):
    """The likelihoods of chunks, compared.

    Attributes:
        values: [n] the loss of the chunks, that of each spread evenly over its tokens; 0 elsewhere.
        label_weights: [n] factors of −log s(label) with which its gradient is that of the loss.
    """

    values: Tensor
    label_weights: Tensor


@torch.no_grad()
def matched_likelihoods(
    hidden: Tensor, head: Head, labels: Tensor, spans: SpanTarget, *, temperature: float
) -> Matched:
    """Compare the likelihoods of chunks.

    A chunk's likelihood is multiplied by the probability that a boundary follows, on both sides:
    else the teacher's would be that of all that goes on with its last token, and the student's that
    of other texts (outcome-chunk debiasing). The student's factor is a constant here; the position
    at which it stands is compared with the teacher's distribution itself.

    Args:
        hidden: [n, D] states of the student.
        head: the student's.
        labels: [n] ids of the next tokens.
        spans: of these positions.
        temperature: τ > 0.
    """
    precision = sum_precision(product_precision(hidden, head))
    values = torch.zeros(len(hidden), dtype=precision, device=hidden.device)
    rows = ((spans.chunk >= 0) | (spans.after >= 0)).nonzero()[:, 0]
    if not len(rows):
        return Matched(values, values)
    token, follows = _log_likelihoods(hidden[rows], head, labels[rows], spans.boundary)
    chunk, after = spans.chunk[rows], spans.after[rows]
    inside, behind = chunk >= 0, after >= 0
    log_p = spans.log_teacher.to(precision)
    log_q, tokens = torch.zeros_like(log_p), torch.zeros_like(log_p)
    log_q.index_add_(0, chunk[inside], token[inside])
    log_q.index_add_(0, after[behind], follows[behind])
    tokens.index_add_(0, chunk[inside], torch.ones_like(token[inside]))
    loss, slope = binary_divergence(log_p / temperature, log_q / temperature)
    numbers = chunk[inside]
    places = rows[inside]
    values[places] = (loss / tokens.clamp(min=1))[numbers]
    label_weights = torch.zeros_like(values)
    label_weights[places] = -slope[numbers] / temperature
    return Matched(values, label_weights)


def binary_divergence(log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
    """KL((P, 1−P) ‖ (Q, 1−Q)) and its derivative with respect to log Q, of logarithms below 0."""
    log_p, log_q = log_p.clamp(max=-_LEAST), log_q.clamp(max=-_LEAST)
    p, q = log_p.exp(), log_q.exp()
    not_p, not_q = -torch.expm1(log_p), -torch.expm1(log_q)
    value = p * (log_p - log_q) + not_p * (not_p.log() - not_q.log())
    return value, not_p * q / not_q - p


def _log_likelihoods(
    hidden: Tensor, head: Head, labels: Tensor, boundary: Tensor
) -> tuple[Tensor, Tensor]:
    """[n] log-probabilities of the labels, and that the next token begins with a boundary."""
    precision = product_precision(hidden, head)
    with torch.autocast(hidden.device.type, enabled=False):
        head = head.constant(precision)
        size, sums = head.vocabulary_size, sum_precision(precision)
        outside = torch.ones(size, dtype=torch.bool, device=hidden.device)
        outside[: len(boundary)] = ~boundary[:size]
        step = rows_per_tile(len(hidden), size, tile_elements(hidden.device))
        room = hidden.new_empty((step, size), dtype=sums)
        found = hidden.new_empty((2, len(hidden)), dtype=sums)
        ids = labels.where(labels != IGNORED, torch.zeros_like(labels))
        for start in range(0, len(hidden), step):
            states = hidden[start : start + step]
            logits = room[: len(states)]
            head.write_logits(states.to(head.weight.dtype), out=logits)
            if head.softcap is not None:
                logits.div_(head.softcap).tanh_().mul_(head.softcap)
            whole = logits.logsumexp(-1)
            place = slice(start, start + len(states))
            found[0, place] = logits.gather(1, ids[place, None])[:, 0] - whole
            found[1, place] = logits.masked_fill_(outside, -torch.inf).logsumexp(-1) - whole
    return found[0], found[1]
