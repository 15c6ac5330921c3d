"""How much of a distribution is left in what was stored of it."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from dominie.losses.targets import SparseTarget


@dataclass(frozen=True, kw_only=True)
class Fidelity:
    """Means over tokens; p is the teacher's distribution, q the stored one, in nats.

    Attributes:
        entries: ids stored of a token.
        missing_mass: of p, on ids that are not stored.
        excess_kl: KL(q ‖ p), with the tail as one outcome where it is stored so. What samples have
            of it is noise, which averages out over tokens; what a tail's shape was is not in it.
        uniform_kl: KL(p ‖ q) with the tail spread evenly over the ids that are not stored;
            infinite where nothing stands for them, as with samples.
        squared_error: Σ (q − p)², the tail spread so. The noise that samples add to a gradient.
        teacher_entropy: of p.
    """

    entries: float
    missing_mass: float
    excess_kl: float
    uniform_kl: float
    squared_error: float
    teacher_entropy: float

    def as_dict(self) -> dict[str, float | None]:
        """The figures as JSON has them: an infinite one is null."""
        return {
            name: round(value, 6) if math.isfinite(value) else None
            for name, value in asdict(self).items()
        }


@torch.no_grad()
def fidelity(target: SparseTarget, logits: Tensor) -> Fidelity:
    """Compares a stored target with logits [N, V] over the temperature it was stored at."""
    log_p = logits.double().log_softmax(-1)
    p = log_p.exp()
    stored, tail = target.outcomes(torch.float64)
    used = target.ids >= 0
    q = torch.zeros_like(p).scatter_add_(1, target.ids.long().clamp_min(0), stored)
    is_stored = torch.zeros_like(p).scatter_add_(1, target.ids.long().clamp_min(0), used.double())
    if target.pool is not None:
        shape, mass = target.pool
        q[:, : len(shape)] += mass.double()[:, None] * shape.double()
        is_stored[:, : len(shape)] += shape > 0
    absent = is_stored == 0
    missing = (p * absent).sum(-1)
    excess = (torch.xlogy(q, q) - q * log_p).sum(-1)
    if tail is not None:
        excess += torch.xlogy(tail, tail) - torch.xlogy(tail, missing.clamp_min(1e-300))
        q = q + absent * (tail / absent.sum(-1).clamp_min(1))[:, None]
    entropy = -(p * log_p).sum(-1)
    return Fidelity(
        entries=float(used.sum(-1).double().mean()),
        missing_mass=float(missing.mean()),
        excess_kl=float(excess.mean()),
        uniform_kl=float((-entropy - torch.xlogy(p, q).sum(-1)).mean()),
        squared_error=float((q - p).square().sum(-1).mean()),
        teacher_entropy=float(entropy.mean()),
    )
