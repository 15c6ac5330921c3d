"""Rows and micro-batches: nothing lost, within bounds, and few positions that hold no token."""

from itertools import chain

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dominie.data.sampling import Layout, layout

ROW = 2048
#: Median and deviation of log-normal lengths: short chats, instructions, long answers, documents.
LENGTHS = [(200, 0.8), (300, 1.0), (500, 0.7), (1000, 0.6)]


def positions(laid: Layout, lengths: list[int]) -> list[int]:
    """Of each micro-batch, padding and all."""
    return [len(rows) * max(sum(lengths[i] for i in row) for row in rows) for rows in laid]


@given(st.data())
def test_every_conversation_is_laid_once_within_the_bounds_of_a_micro_batch(data):
    lengths = data.draw(st.lists(st.integers(1, 50), min_size=1, max_size=40))
    routes = [data.draw(st.integers(0, 2)) for _ in lengths]
    micro_batches = data.draw(st.integers(1, len(lengths)))
    capacity = data.draw(st.none() | st.integers(50, 120))
    laid = layout(lengths, routes, micro_batches=micro_batches, capacity=capacity)
    assert len(laid) == micro_batches
    assert all(rows and all(rows) for rows in laid), "none is empty"
    rows = list(chain.from_iterable(laid))
    assert sorted(chain.from_iterable(rows)) == list(range(len(lengths)))
    for row in rows:
        assert len({routes[i] for i in row}) == 1, "a row has one teacher"
        assert len(row) == 1 or (capacity and sum(lengths[i] for i in row) <= capacity)
    # As many rows as conversations come to one on average, each as long as a row can be.
    most = -(-len(lengths) // micro_batches) * max(capacity or 0, *lengths)
    assert max(positions(laid, lengths)) <= most


def drawn(median: float, deviation: float, count: int, seed: int) -> list[int]:
    drawn = np.random.default_rng(seed).lognormal(np.log(median), deviation, count)
    return np.clip(drawn.astype(int), 8, ROW).tolist()


@pytest.mark.parametrize("domain", [0, 26])
@pytest.mark.parametrize("micro_batch", [8, 16, 32])
@pytest.mark.parametrize(("median", "deviation"), LENGTHS)
def test_positions_are_mostly_tokens(median, deviation, micro_batch, domain):
    """A step of 256, of which a second teacher has none or a tenth; nearly even micro-batches."""
    routes = [1] * domain + [0] * (256 - domain)
    real = 0
    taken: list[int] = []
    for seed in range(5):
        lengths = drawn(median, deviation, 256, seed)
        laid = layout(lengths, routes, micro_batches=256 // micro_batch, capacity=ROW)
        real += sum(lengths)
        taken += positions(laid, lengths)
        two_teachers = [rows for rows in laid if len({routes[i] for row in rows for i in row}) > 1]
        assert len(two_teachers) <= 1, "else both teachers run for each"
    assert real / sum(taken) > 0.96
    assert max(taken) < 1.6 * np.mean(taken)


@pytest.mark.parametrize(("median", "deviation"), LENGTHS)
def test_without_packing_conversations_of_about_one_length_go_together(median, deviation):
    lengths = drawn(median, deviation, 256, seed=0)
    aware = positions(layout(lengths, micro_batches=32), lengths)
    in_order = positions(
        [[[i] for i in range(start, start + 8)] for start in range(0, 256, 8)], lengths
    )
    assert sum(lengths) / sum(aware) > 0.94 > 0.75 > sum(lengths) / sum(in_order)
    assert max(aware) < max(in_order)


def test_a_small_batch_is_packed_as_well_as_it_can_be():
    real = taken = 0
    for seed in range(100):
        lengths = drawn(200, 0.8, 8, seed)
        real += sum(lengths)
        taken += sum(positions(layout(lengths, capacity=ROW), lengths))
    assert real / taken > 0.95
