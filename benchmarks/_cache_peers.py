"""Other ways to store a distribution, to compare with.

DistillKit's coding is re-derived from its README ("Logit Compression", "Recommended configuration"
and "budget pick"): the k likeliest ids in ⌈log₂V⌉ bits each, the first logarithms of probabilities
in bfloat16, the others as a least-squares curve over their rank, its coefficients in float32. Its
sizes come out as published: 296 and 108 bytes a token at V = 32,000. A missing probability is
`zero`, as in its own example.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from dominie.losses import SparseTarget


@dataclass(frozen=True)
class DistillKit:
    """One of its settings; `powers` of the rank, 0.5 for its term `sqrt`."""

    k: int
    exact: int
    powers: tuple[float, ...]

    def bytes_per_token(self, vocabulary: int) -> int:
        """Ids, exact logarithms and coefficients."""
        bits = self.k * math.ceil(math.log2(vocabulary))
        return math.ceil(bits / 8) + 2 * self.exact + 4 * len(self.powers)

    def stored(self, logits: torch.Tensor) -> SparseTarget:
        """What a reader gets back of logits [N, V]."""
        logarithms, ids = logits.log_softmax(-1).topk(self.k)
        exact = logarithms[:, : self.exact].bfloat16().double()
        ranks = torch.arange(self.exact, self.k, dtype=torch.float64) / self.k
        terms = torch.stack([ranks**power for power in self.powers], 1)
        curve = logarithms[:, self.exact :].double()
        coefficients = (curve @ torch.linalg.pinv(terms).t()).float().double()
        restored = torch.cat([exact, coefficients @ terms.t()], 1).clamp(max=0.0)
        return SparseTarget(ids, restored.exp().float(), None)


RECOMMENDED = DistillKit(k=128, exact=16, powers=(0, 1, 2, 3, 4, 0.5))
BUDGET = DistillKit(k=50, exact=1, powers=(0, 1, 0.5))
