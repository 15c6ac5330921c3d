"""What a teacher is to the rest of the house."""

from __future__ import annotations

from typing import Protocol

from dominie.data.batches import Batch
from dominie.losses.signal import Signal


class Teacher(Protocol):
    """Anything that has a word to say on a batch: a model, a router, a cache."""

    def signal(self, batch: Batch) -> Signal:
        """Targets for the supervised positions of the rows this teacher speaks about."""
