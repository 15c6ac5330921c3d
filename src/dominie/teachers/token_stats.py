"""Mean probabilities of tokens, by which a cache orders ids and pools the rarest."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray


@dataclass(frozen=True, eq=False)
class TokenStats:
    """Measured once, when a cache is begun, on its first rows; part of the cache from then on.

    Attributes:
        ids: [V] the commonest first, by the teacher's mean probability.
        tails: [V] the mean probability of each id when it was no head.
        pooled: share of the tails' mass whose ids, the rarest, are pooled.
    """

    ids: NDArray[np.int64]
    tails: NDArray[np.float32]
    pooled: float

    @cached_property
    def is_pooled(self) -> NDArray[np.bool_] | None:
        """[V] whether an id is of the pool; None if there is none."""
        mass = self.tails[self.ids[::-1]].cumsum(dtype=np.float64)  # the rarest first
        count = int(np.searchsorted(mass, self.pooled * mass[-1])) if mass[-1] > 0 else 0
        if count < 2:
            return None
        pool = np.zeros(len(self.ids), bool)
        pool[self.ids[::-1][:count]] = True
        return pool

    @cached_property
    def pool_shape(self) -> NDArray[np.float32] | None:
        """[V] the teacher's average over the pool, a distribution."""
        if self.is_pooled is None:
            return None
        shape = np.where(self.is_pooled, self.tails.astype(np.float64) + 1e-12, 0.0)
        normalised: NDArray[np.float32] = (shape / shape.sum()).astype(np.float32)
        return normalised

    def save(self, path: Path) -> str:
        """Write it, and return the checksum of what was written."""
        with path.open("wb") as file:
            np.save(file, np.stack([self.ids.astype(np.float64), self.tails.astype(np.float64)]))
        return _checksum(path)


def load_token_stats(path: Path, size: int, pooled: float) -> TokenStats:
    """The inverse of `TokenStats.save`.

    Args:
        path: named by the checksum of its content.
        size: ids there have to be.
        pooled: see `TokenStats`.

    Raises:
        ValueError: it is not what was written.
    """
    if _checksum(path) != path.name.partition(".")[0]:
        raise ValueError("its checksum is another")
    ids, tails = np.load(path, allow_pickle=False)
    if not np.array_equal(np.sort(ids), np.arange(size)):
        raise ValueError("not the ids of the vocabulary")
    return TokenStats(ids.astype(np.int64), tails.astype(np.float32), pooled)


def _checksum(path: Path) -> str:
    return hashlib.blake2b(path.read_bytes(), digest_size=16).hexdigest()
