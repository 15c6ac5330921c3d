"""What a prediction is compared with: a teacher's hidden states, or stored probabilities."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor

    from dominie.losses.heads import Head


@dataclass(frozen=True, eq=False)
class DenseTarget:
    """A teacher's hidden states [N, D_t] and the head that turns them into logits."""

    hidden: Tensor
    head: Head

    def __len__(self) -> int:
        return len(self.hidden)

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
        tail: [N], 1 − Σ probabilities.
    """

    ids: Tensor
    probabilities: Tensor
    tail: Tensor

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
        if self.tail.shape != self.ids.shape[:1]:
            raise ValueError(f"tail is [N] = [{len(self.ids)}], found {list(self.tail.shape)}")

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def device(self) -> torch.device:
        """Where the target is."""
        return self.ids.device

    def outcomes(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """The probabilities [N, K], 0 in unused places, and the tail [N], 0 where it is less."""
        p = self.probabilities.to(dtype)
        return p.where(self.ids >= 0, torch.zeros_like(p)), self.tail.to(dtype).clamp_min(0)

    def entropy(self, dtype: torch.dtype) -> Tensor:
        """[N] in nats, the tail taken as one outcome: at most the entropy of what was cut."""
        p, tail = self.outcomes(dtype)
        return -torch.xlogy(p, p).sum(-1) - torch.xlogy(tail, tail)

    def likeliest(self) -> Tensor:
        """[N] the id of the largest probability; negative where a row has no id at all."""
        best = self.probabilities.where(self.ids >= 0, -1).argmax(-1, keepdim=True)
        return self.ids.gather(1, best)[:, 0]

    def __getitem__(self, rows: slice) -> SparseTarget:
        return SparseTarget(self.ids[rows], self.probabilities[rows], self.tail[rows])


def sparse_forward_kl(
    log_s: Tensor, target: SparseTarget, *, gradient: bool
) -> tuple[Tensor, Tensor | None]:
    """Σ p·log(p/s) + tail·log(tail / (1 − Σ s)), the student normalised over all of its tokens.

    A lower bound of the KL to the distribution that was cut (data processing), equal to the KL
    to the teacher that spreads its tail as the student does.

    Args:
        log_s: [n, V] log-probabilities of the student.
        target: n rows. A tail is nothing where the ids cover the vocabulary.
        gradient: whether the second result is wanted.

    Returns:
        The divergence [n], and its gradient with respect to the student's logits [n, V] or None.
    """
    ids, (p, tail) = target.ids.long().clamp_min(0), target.outcomes(log_s.dtype)
    # 1 − Σ s cancels for a student that is sure: sum the others instead, in logarithms.
    removed = torch.zeros_like(p).masked_fill_(target.ids >= 0, -torch.inf)
    log_others = log_s.scatter_add(1, ids, removed)
    log_rest = log_others.logsumexp(-1)
    tail = tail.where(log_rest > -torch.inf, torch.zeros_like(tail))
    log_rest = log_rest.where(tail > 0, torch.zeros_like(tail))
    value = (torch.xlogy(p, p) - p * log_s.gather(1, ids)).sum(-1)
    value += torch.xlogy(tail, tail) - tail * log_rest
    if not gradient:
        return value, None
    slope = log_s.exp().mul_((p.sum(-1) + tail)[:, None]).scatter_add_(1, ids, -p)
    slope -= log_others.sub_(log_rest[:, None]).exp_().mul_(tail[:, None])
    return value, slope
