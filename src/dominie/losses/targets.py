"""Distillation targets: a teacher's hidden states or stored probabilities, and its attention."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dominie.losses.attention_rows import Projections
from dominie.losses.heads import Head

if TYPE_CHECKING:
    from dominie.losses.spans import SpanTarget


@dataclass(frozen=True, eq=False)
class DenseTarget:
    """A teacher's hidden states [N, D_t] and the head that turns them into logits."""

    hidden: Tensor
    head: Head

    def __len__(self) -> int:
        return len(self.hidden)

    def __getitem__(self, rows: slice | Tensor) -> DenseTarget:
        return DenseTarget(self.hidden[rows], self.head)

    @property
    def device(self) -> torch.device:
        """Where the target is."""
        return self.hidden.device


@dataclass(frozen=True, eq=False)
class SparseTarget:
    """A teacher's likeliest tokens, and the probability it left to all others.

    The tail is one more outcome: a student that moves mass out of ``ids`` is charged for it,
    where renormalising over the K tokens would let that mass leak for free.

    Args:
        ids: [N, K] token ids, distinct in a row; a negative id marks an unused place.
        probabilities: [N, K], at the temperature of the loss.
        tail: [N], 1 − Σ probabilities; None where the probabilities are all there is (they then
            need not sum to 1 exactly, as those of samples).
        teacher_entropy: [N] in nats, of the distribution that was sampled. The value of the
            divergence is then an unbiased estimate of the whole one; else samples, which look
            surer than what they were drawn from, make it too large. No gradient depends on it.
        pool: a distribution [V] over tokens that are not stored one by one, and the mass [N] of
            each row on it. Only without a tail.
        fold: [V] for each token of the student the one it is counted with, mostly itself; a token
            that is in the ids of a row counts for itself there. Only with a tail.
    """

    ids: Tensor
    probabilities: Tensor
    tail: Tensor | None
    teacher_entropy: Tensor | None = None
    pool: tuple[Tensor, Tensor] | None = None
    fold: Tensor | None = None

    def __post_init__(self) -> None:
        if self.ids.ndim != 2 or self.ids.is_floating_point():
            raise ValueError(
                f"ids are whole numbers [N, K], found {self.ids.dtype} {list(self.ids.shape)}"
            )
        if self.probabilities.shape != self.ids.shape:
            raise ValueError(
                f"probabilities are [N, K] = {list(self.ids.shape)}, "
                f"found {list(self.probabilities.shape)}"
            )
        for name, values in (
            ("tail", self.tail),
            ("teacher_entropy", self.teacher_entropy),
            ("the pool's mass", self.pool and self.pool[1]),
        ):
            if values is not None and values.shape != self.ids.shape[:1]:
                raise ValueError(f"{name} is [N] = [{len(self.ids)}], found {list(values.shape)}")
        if self.pool is not None and self.tail is not None:
            raise ValueError("a pool is for a target without a tail")
        if self.fold is not None and self.tail is None:
            raise ValueError("tokens are folded in a target with a tail")

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def device(self) -> torch.device:
        """Where the target is."""
        return self.ids.device

    def outcomes(self, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
        """The probabilities [N, K], 0 in unused places, and the tail [N], 0 where it is less."""
        p = self.probabilities.to(dtype)
        tail = None if self.tail is None else self.tail.to(dtype).clamp_min(0)
        return p.where(self.ids >= 0, torch.zeros_like(p)), tail

    def entropy(self, dtype: torch.dtype) -> Tensor:
        """[N] in nats: the teacher's where it is known, else with the tail as one outcome.

        That is at most the entropy of what was cut.
        """
        if self.teacher_entropy is not None:
            return self.teacher_entropy.to(dtype)
        p, tail = self.outcomes(dtype)
        entropy = -torch.xlogy(p, p).sum(-1)
        if self.pool is not None:
            shape, mass = (part.to(dtype) for part in self.pool)
            entropy -= torch.xlogy(mass, mass) + mass * torch.xlogy(shape, shape).sum()
        return entropy if tail is None else entropy - torch.xlogy(tail, tail)

    def likeliest(self) -> Tensor:
        """[N] the id of the largest probability; negative where a row has no id at all."""
        best = self.probabilities.where(self.ids >= 0, -1).argmax(-1, keepdim=True)
        return self.ids.gather(1, best)[:, 0]

    def __getitem__(self, rows: slice | Tensor) -> SparseTarget:
        return SparseTarget(
            self.ids[rows],
            self.probabilities[rows],
            None if self.tail is None else self.tail[rows],
            None if self.teacher_entropy is None else self.teacher_entropy[rows],
            None if self.pool is None else (self.pool[0], self.pool[1][rows]),
            self.fold,
        )


def sparse_forward_kl(
    log_s: Tensor, target: SparseTarget, *, gradient: bool
) -> tuple[Tensor, Tensor | None]:
    """Σ p·log(p/s) + tail·log(tail / (1 − Σ s)), the student normalised over all of its tokens.

    A lower bound of the KL to the distribution that was cut (data processing), equal to the KL
    to the teacher that spreads its tail as the student does. Where the target knows its teacher's
    entropy H, −H stands in the place of Σ p·log p + tail·log tail.

    Args:
        log_s: [n, V] log-probabilities of the student.
        target: n rows. A tail is nothing where the ids cover the vocabulary.
        gradient: whether the second result is wanted.

    Returns:
        The divergence [n], and its gradient with respect to the student's logits [n, V] or None.
    """
    if target.fold is not None:
        return _folded_forward_kl(log_s, target, target.fold, gradient=gradient)
    ids, (p, tail) = target.ids.long().clamp_min(0), target.outcomes(log_s.dtype)
    if tail is None:  # as cheap as the next-token loss
        value = -target.entropy(log_s.dtype) - (p * log_s.gather(1, ids)).sum(-1)
        if target.pool is None:
            shape, mass = log_s.new_zeros(0), log_s.new_zeros(len(log_s))
        else:
            shape, mass = (part.to(log_s.dtype) for part in target.pool)
            if len(shape) < log_s.shape[1]:  # further rows of the student's head are padding
                shape = torch.nn.functional.pad(shape, (0, log_s.shape[1] - len(shape)))
            value -= mass * (log_s @ shape)
        if not gradient:
            return value, None
        slope = log_s.exp().mul_((p.sum(-1) + mass)[:, None]).scatter_add_(1, ids, -p)
        if len(shape):
            torch.addcmul(slope, mass[:, None], shape, value=-1, out=slope)
        return value, slope
    # 1 − Σ s cancels for a student that is sure: sum the others instead, in logarithms.
    removed = torch.zeros_like(p).masked_fill_(target.ids >= 0, -torch.inf)
    log_others = log_s.scatter_add(1, ids, removed)
    log_rest = log_others.logsumexp(-1)
    tail = tail.where(log_rest > -torch.inf, torch.zeros_like(tail))
    log_rest = log_rest.where(tail > 0, torch.zeros_like(tail))
    if target.teacher_entropy is None:
        negative_entropy = torch.xlogy(p, p).sum(-1) + torch.xlogy(tail, tail)
    else:
        negative_entropy = -target.entropy(log_s.dtype)
    value = negative_entropy - (p * log_s.gather(1, ids)).sum(-1) - tail * log_rest
    if not gradient:
        return value, None
    slope = log_s.exp().mul_((p.sum(-1) + tail)[:, None]).scatter_add_(1, ids, -p)
    slope -= log_others.sub_(log_rest[:, None]).exp_().mul_(tail[:, None])
    return value, slope


def _folded_forward_kl(
    log_s: Tensor, target: SparseTarget, fold: Tensor, *, gradient: bool
) -> tuple[Tensor, Tensor | None]:
    """`sparse_forward_kl` where some tokens of the student count with others."""
    size, (p, tail) = log_s.shape[1], target.outcomes(log_s.dtype)
    assert tail is not None, "checked when the target was made"
    folded = (fold[:size] != torch.arange(len(fold[:size]), device=fold.device)).nonzero()[:, 0]
    onto = fold[folded].expand(len(log_s), -1)
    used = target.ids >= 0
    ids = target.ids.long().clamp_min(0)
    # One column more takes what unused places are written to.
    places = ids.where(used, torch.full_like(ids, size))
    own = log_s.gather(1, ids)
    others = torch.nn.functional.pad(log_s.exp(), (0, 1)).scatter_(1, places, 0.0)[:, :size]
    grouped = others.index_fill(1, folded, 0.0).scatter_add_(1, onto, others[:, folded])
    log_mass = torch.logaddexp(own, grouped.gather(1, ids).log())
    grouped = torch.nn.functional.pad(grouped, (0, 1)).scatter_(1, places, 0.0)[:, :size]
    rest = grouped.sum(-1)
    tail = tail.where(rest > 0, torch.zeros_like(tail))
    rest = rest.where(tail > 0, torch.ones_like(rest))
    value = -target.entropy(log_s.dtype) - torch.where(used, p * log_mass, 0.0).sum(-1)
    value -= tail * rest.log()
    if not gradient:
        return value, None
    total = (p.sum(-1) + tail)[:, None]
    ratio = (tail / rest)[:, None].repeat(1, size + 1)
    tiny = torch.finfo(p.dtype).tiny
    ratio.scatter_(1, places, p / log_mass.exp().clamp_min(tiny))
    ratio = ratio[:, :size].scatter(1, folded.expand(len(log_s), -1), ratio.gather(1, onto))
    slope = others * (total - ratio)
    mine = (own.exp() * total - p * (own - log_mass).exp()) * used
    return value, slope.scatter_add_(1, ids, mine)


#: What a student is compared with at N positions; indexed by position.
Target = DenseTarget | SparseTarget


@dataclass(frozen=True)
class Part:
    """One teacher's targets for some rows of a batch.

    Attributes:
        rows: [R] indices of the rows of the batch, each once; on the CPU.
        target: one entry for each supervised position of those rows in row-major order; None if
            only attention was asked for.
        attention: teacher layer → query and key after rotary embedding, batch dimension R.
    """

    rows: Tensor
    target: Target | SpanTarget | None
    attention: Mapping[int, Projections] = field(default_factory=dict)

    def of(self, start: int, stop: int, length: int, supervised: Sequence[int]) -> Part | None:
        """The part for the batch whose rows are those from `start` to `stop`; None without any.

        Args:
            start: row of this batch that is the first of the other; the rows of the part ascend.
            stop: the first behind it.
            length: of the other's rows, which may be shorter.
            supervised: [B] positions of each row of this batch.
        """
        rows = self.rows.tolist()
        first, last = (sum(each < row for each in rows) for row in (start, stop))
        if first == last:
            return None
        tokens = slice(*(sum(supervised[each] for each in rows[:end]) for end in (first, last)))
        attention = {
            layer: replace(
                each,
                query=each.query[first:last, :, :length],
                key=each.key[first:last, :, :length],
            )
            for layer, each in self.attention.items()
        }
        target = None if self.target is None else self.target[tokens]
        return Part(self.rows[first:last] - start, target, attention)


@dataclass(frozen=True)
class Signal:
    """The parts of a batch that have a teacher; no row stands in two of them."""

    parts: tuple[Part, ...] = ()
