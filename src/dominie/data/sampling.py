"""The order in which conversations are learnt: sources mixed by share, exactly and reproducibly."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Literal

import numpy as np
from numpy.typing import NDArray


def total_conversations(
    sizes: Mapping[str, int], shares: Mapping[str, float], epochs: float
) -> int:
    """How many conversations make `epochs` passes over the largest source of the mix."""
    active = [name for name in shares if shares[name] > 0]
    largest = max(active, key=lambda name: sizes[name])
    return math.ceil(epochs * sizes[largest] * sum(shares.values()) / shares[largest])


#: What a source is given at a time: a conversation, a micro-batch of them or an optimiser step.
Mixing = Literal["conversations", "micro_batches", "steps"]


class Mix:
    """The whole run's order of conversations, cut into optimiser steps.

    Every optimiser step takes `batch` conversations. Sources take turns by the conversation, by the
    micro-batch or by the step. After any number of turns each source has had its share of them to
    within one turn: the fraction is exact over the run, not only in expectation. Each source is
    drawn without replacement and reshuffled on every pass. The order is a function of the arguments
    alone.

    Args:
        sizes: conversations in each source.
        shares: fraction of conversations from each source; normalised to sum to one.
        batch: conversations in an optimiser step, over all ranks.
        micro_batch: conversations in a turn where sources take turns by the micro-batch; divides
            `batch`.
        steps: optimiser steps in the run.
        seed: of the shuffles.
        mixing: what a turn is.

    Iterating yields the steps as lists of (source index, row index).
    """

    def __init__(
        self,
        sizes: Mapping[str, int],
        shares: Mapping[str, float],
        *,
        batch: int,
        micro_batch: int,
        steps: int,
        seed: int,
        mixing: Mixing = "conversations",
    ) -> None:
        self.turn = {"conversations": 1, "micro_batches": micro_batch, "steps": batch}[mixing]
        self.sizes = [sizes[name] for name in shares]
        weights = np.array(list(shares.values()), dtype=np.float64)
        self.shares: NDArray[np.float64] = weights / weights.sum()
        self.batch, self.micro_batch, self.steps, self.seed = batch, micro_batch, steps, seed

    def __len__(self) -> int:
        return self.steps

    @property
    def micro_batches(self) -> int:
        """Of a step, over all ranks."""
        return self.batch // self.micro_batch

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        rows = [self._rows(source) for source in range(len(self.sizes))]
        for turns in self._steps():
            sources = np.repeat(turns, self.turn)
            yield [(int(source), next(rows[source])) for source in sources]

    def _steps(self) -> Iterator[NDArray[np.int64]]:
        """Whose turns the steps consist of, shuffled within each step."""
        order = np.random.default_rng([self.seed, 0])
        given = np.zeros(len(self.sizes), dtype=np.int64)
        for _ in range(self.steps):
            counts = np.zeros_like(given)
            for _ in range(self.batch // self.turn):
                source = self._next_source(given)
                given[source] += 1
                counts[source] += 1
            yield order.permutation(np.repeat(np.arange(len(counts)), counts))

    def _next_source(self, given: NDArray[np.int64]) -> int:
        """Whose turn it is: of the sources that have fallen behind, the one that is due first.

        Keeps every source within one turn of its share (Tijdeman, The chairman assignment
        problem, 1980).
        """
        if len(given) == 1:
            return 0
        slack = 1.0 / (2 * len(given) - 2)
        behind = self.shares * (given.sum() + 1) - given >= slack - 1e-9
        with np.errstate(divide="ignore"):
            due = (given + 1 - slack) / self.shares
        return int(np.argmin(np.where(behind, due, np.inf)))

    def _rows(self, source: int) -> Iterator[int]:
        shuffle = np.random.default_rng([self.seed, 1, source])
        while True:
            yield from map(int, shuffle.permutation(self.sizes[source]))
