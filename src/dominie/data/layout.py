"""Lays the conversations of an optimiser step out in rows and micro-batches, with little padding.

A micro-batch is as long as its longest row; the rest of it is padding. So the conversations of a
whole optimiser step are packed at once: their gradient is one sum, whichever of them share a
forward pass. Rows are made about equally long, and rows of about one length go together.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence

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
        return _distribute(alone, lengths, micro_batches)
    tokens = sum(lengths)
    fewest = max(-(-tokens // (capacity * micro_batches)), -(-len(groups) // micro_batches))
    best, least = _distribute(alone, lengths, micro_batches), float("inf")
    for each in range(fewest, -(-len(lengths) // micro_batches) + 1):
        counts = _row_counts(min(each * micro_batches, len(lengths)), groups, lengths)
        rows = [
            _balanced(group, lengths, count) for group, count in zip(groups, counts, strict=True)
        ]
        if any(_tokens(row, lengths) > capacity for group in rows for row in group if row[1:]):
            continue
        found = _distribute(rows, lengths, micro_batches)
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


def _row_counts(rows: int, groups: Sequence[Sequence[int]], lengths: Sequence[int]) -> list[int]:
    """How many of so many rows each group gets, so that none of them is longer than it must be."""
    counts = [1] * len(groups)
    tokens = [_tokens(group, lengths) for group in groups]
    longest = [(-float(total), g) for g, total in enumerate(tokens) if len(groups[g]) > 1]
    heapq.heapify(longest)
    for _ in range(rows - len(groups)):
        _, g = heapq.heappop(longest)
        counts[g] += 1
        if counts[g] < len(groups[g]):
            heapq.heappush(longest, (-tokens[g] / counts[g], g))
    return counts


def _balanced(longest_first: Sequence[int], lengths: Sequence[int], count: int) -> list[list[int]]:
    """So many rows of about one length: each conversation goes to the row with fewest tokens."""
    rows: list[list[int]] = [[] for _ in range(count)]
    emptiest = [(0, r) for r in range(count)]
    for i in longest_first:
        tokens, r = emptiest[0]
        rows[r].append(i)
        heapq.heapreplace(emptiest, (tokens + lengths[i], r))
    return rows


def _distribute(
    groups: Sequence[Sequence[Sequence[int]]], lengths: Sequence[int], micro_batches: int
) -> Layout:
    """Micro-batches of rows of about one length, route after route, the longest first.

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
