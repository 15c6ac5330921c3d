"""The order in which conversations are learnt, and how those of a step are packed into rows.

A micro-batch is as long as its longest row; the rest of it is padding. So the conversations of a
whole optimiser step are packed at once: their gradient is one sum, whichever of them share a
forward pass. Rows are made about equally long, and rows of about one length go together.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterator, Mapping, Sequence
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


#: Conversations of each row, rows of each micro-batch.
Layout = list[list[list[int]]]

#: Real tokens of all positions at which no better layout is looked for.
_FULL = 0.98


def layout(
    lengths: Sequence[int],
    routes: Sequence[int] | None = None,
    *,
    micro_batches: int = 1,
    capacity: int | None = None,
) -> Layout:
    """Lay conversations out in rows and rows in micro-batches, with little padding.

    Micro-batches have about equally many rows, and so never more than there are conversations to
    one of them on average, rounded up. Conversations of different routes never share a row, so that
    a row has one teacher, and seldom a micro-batch, so that it has few.

    Args:
        lengths: [n] tokens of each conversation.
        routes: [n] the route of each; None is one for all.
        micro_batches: how many there are to be, at most n.
        capacity: longest row in tokens that several conversations may share; None gives each a row
            of its own.

    Returns:
        Indices of conversations, each of them once.
    """
    by_route: dict[int, list[int]] = {}
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        by_route.setdefault(routes[i] if routes else 0, []).append(i)
    groups = [by_route[route] for route in sorted(by_route)]
    alone = [[[i] for i in group] for group in groups]
    if capacity is None:
        return _dealt_out(alone, lengths, micro_batches)
    tokens = sum(lengths)
    fewest = max(-(-tokens // (capacity * micro_batches)), -(-len(groups) // micro_batches))
    best, least = _dealt_out(alone, lengths, micro_batches), float("inf")
    for each in range(fewest, -(-len(lengths) // micro_batches) + 1):
        counts = _shared_out(min(each * micro_batches, len(lengths)), groups, lengths)
        rows = [
            _levelled(group, lengths, count) for group, count in zip(groups, counts, strict=True)
        ]
        if any(_tokens(row, lengths) > capacity for group in rows for row in group if row[1:]):
            continue
        found = _dealt_out(rows, lengths, micro_batches)
        if (positions := _positions(found, lengths)) < least:
            best, least = found, positions
        if tokens >= _FULL * least:
            break
    return best


def _tokens(row: Sequence[int], lengths: Sequence[int]) -> int:
    return sum(lengths[i] for i in row)


def _positions(found: Layout, lengths: Sequence[int]) -> int:
    """Positions of all micro-batches, padding and all."""
    return sum(len(rows) * max(_tokens(row, lengths) for row in rows) for rows in found)


def _shared_out(rows: int, groups: Sequence[Sequence[int]], lengths: Sequence[int]) -> list[int]:
    """How many of so many rows each group gets, so that none of them is longer than it must be."""
    counts = [1] * len(groups)
    tokens = [_tokens(group, lengths) for group in groups]
    longest: list[tuple[float, int]] = [
        (-total, g) for g, total in enumerate(tokens) if len(groups[g]) > 1
    ]
    heapq.heapify(longest)
    for _ in range(rows - len(groups)):
        _, g = heapq.heappop(longest)
        counts[g] += 1
        if counts[g] < len(groups[g]):
            heapq.heappush(longest, (-tokens[g] / counts[g], g))
    return counts


def _levelled(longest_first: Sequence[int], lengths: Sequence[int], count: int) -> list[list[int]]:
    """So many rows of about one length: each conversation goes to the row with fewest tokens."""
    rows: list[list[int]] = [[] for _ in range(count)]
    emptiest = [(0, r) for r in range(count)]
    for i in longest_first:
        tokens, r = emptiest[0]
        rows[r].append(i)
        heapq.heapreplace(emptiest, (tokens + lengths[i], r))
    return rows


def _dealt_out(
    groups: Sequence[Sequence[Sequence[int]]], lengths: Sequence[int], micro_batches: int
) -> Layout:
    """Rows of about one length to a micro-batch, route after route, the longest first.

    Micro-batches are about equally large, padding counted, so that no rank waits and none holds
    more than it must: the largest is as small as it can be in this order.
    """
    rows: list[tuple[int, list[int]]] = []
    for group in groups:
        rows += sorted(((_tokens(row, lengths), list(row)) for row in group), reverse=True)
    sizes = [tokens for tokens, _ in rows]
    low, high = max(sizes), len(sizes) * max(sizes)
    while low < high:
        middle = (low + high) // 2
        fits = len(_cuts(sizes, middle)) <= micro_batches
        low, high = (low, middle) if fits else (middle + 1, high)
    parts = [rows[start:stop] for start, stop in _cuts(sizes, high)]
    while len(parts) < micro_batches:
        largest = max((p for p in parts if p[1:]), key=lambda p: len(p) * max(p)[0])
        at, half = parts.index(largest), len(largest) // 2
        parts[at : at + 1] = [largest[:half], largest[half:]]
    return [[row for _, row in part] for part in parts]


def _cuts(sizes: Sequence[int], most: int) -> list[tuple[int, int]]:
    """Where rows are cut into micro-batches of at most so many positions: starts and stops."""
    starts, longest = [0], 0
    for r, size in enumerate(sizes):
        longest = max(longest, size)
        if (r - starts[-1] + 1) * longest > most:
            starts.append(r)
            longest = size
    return list(zip(starts, [*starts[1:], len(sizes)], strict=True))
