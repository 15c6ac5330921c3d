"""How many positions of a forward pass hold a token, by how a step's conversations are laid out.

Lengths are drawn log-normal and cut at the longest row, 2,048 tokens. Each setting is laid out over
a whole optimiser step, as training does it, and beside that within each micro-batch alone; with one
teacher, and with a second one that has a tenth of the conversations and shares no row.

    python benchmarks/packing.py [--quick] [--json]

``--quick`` draws fewer steps; a full run also writes a dated table to ``benchmarks/results``.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import _results
import numpy as np
from _results import Row

from dominie.data.layout import Layout, layout

if TYPE_CHECKING:
    from collections.abc import Iterator

ROW = 2048
#: Median tokens of a conversation and the deviation of their logarithm.
LENGTHS = [(200, 0.8), (300, 1.0), (500, 0.7), (1000, 0.6)]
#: Conversations of an optimiser step and of a micro-batch.
BATCHES = [(256, 8), (256, 32), (64, 8), (64, 32)]

Lay = Callable[[list[int], list[int], int], list[Layout]]


def over_the_step(lengths: list[int], routes: list[int], micro_batch: int) -> list[Layout]:
    """Rows and micro-batches of all conversations together."""
    count = len(lengths) // micro_batch
    return [layout(lengths, routes, micro_batches=count, capacity=ROW)]


def by_length(lengths: list[int], routes: list[int], micro_batch: int) -> list[Layout]:
    """One conversation to a row, those of about one length together."""
    return [layout(lengths, routes, micro_batches=len(lengths) // micro_batch)]


def in_each_micro_batch(lengths: list[int], routes: list[int], micro_batch: int) -> list[Layout]:
    """Rows of what happens to come together."""
    found = []
    for start in range(0, len(lengths), micro_batch):
        part = slice(start, start + micro_batch)
        (laid,) = layout(lengths[part], routes[part], capacity=ROW)
        found.append([[[start + i for i in row] for row in laid]])
    return found


def in_order(lengths: list[int], _: list[int], micro_batch: int) -> list[Layout]:
    """One conversation to a row, padded to the longest that happens to be beside it."""
    starts = range(0, len(lengths), micro_batch)
    return [[[[i] for i in range(start, start + micro_batch)]] for start in starts]


def positions(found: Sequence[Layout], lengths: Sequence[int]) -> int:
    """Of all micro-batches, padding and all."""
    micro_batches = itertools.chain.from_iterable(found)
    return sum(len(m) * max(sum(lengths[i] for i in row) for row in m) for m in micro_batches)


def real_tokens(steps: Sequence[tuple[list[int], list[int]]], micro_batch: int, lay: Lay) -> str:
    """Tokens of all positions, in percent."""
    taken = sum(positions(lay(*step, micro_batch), step[0]) for step in steps)
    return f"{100 * sum(sum(lengths) for lengths, _ in steps) / taken:.1f} %"


def drawn(
    median: int, deviation: float, batch: int, count: int, *, domain: float
) -> list[tuple[list[int], list[int]]]:
    """Lengths and routes of so many steps."""
    random = np.random.default_rng(0)
    steps = []
    for _ in range(count):
        lengths = random.lognormal(np.log(median), deviation, batch).astype(int).clip(8, ROW)
        routes = random.permutation(np.arange(batch) < round(domain * batch)).astype(int)
        steps.append((lengths.tolist(), routes.tolist()))
    return steps


def rows(quick: bool) -> Iterator[Row]:
    """One row for each distribution and batch."""
    for (median, deviation), (batch, micro_batch) in itertools.product(LENGTHS, BATCHES):
        count = 5 if quick else 50
        one = drawn(median, deviation, batch, count, domain=0.0)
        two = drawn(median, deviation, batch, count, domain=0.1)
        started = time.process_time()
        packed = real_tokens(one, micro_batch, over_the_step)
        milliseconds = 1000 * (time.process_time() - started) / count
        yield {
            "median (deviation)": f"{median} ({deviation})",
            "batch": batch,
            "micro_batch": micro_batch,
            "packed over the step": packed,
            "within micro-batches": real_tokens(one, micro_batch, in_each_micro_batch),
            "two teachers, step": real_tokens(two, micro_batch, over_the_step),
            "two teachers, micro-batches": real_tokens(two, micro_batch, in_each_micro_batch),
            "not packed, by length": real_tokens(one, micro_batch, by_length),
            "not packed, in order": real_tokens(one, micro_batch, in_order),
            "ms a step": f"{milliseconds:.1f}",
        }


def main() -> None:
    """Measure, print, and after a full run write down."""
    options = _results.parser(__doc__).parse_args()
    parts = _results.gathered(rows(options.quick), as_json=options.json)
    note = "Real tokens of all positions; CPU time for laying a step out."
    _results.finish("packing", "Real tokens of a step", parts, options, note=note)


if __name__ == "__main__":
    main()
