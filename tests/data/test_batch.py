"""Batches: what is supervised, what shares a row, and nothing lost in packing."""

from dataclasses import dataclass
from itertools import chain

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dominie.data.batch import IGNORED, Batch, Padding, collate, joined
from dominie.data.layout import Layout, layout
from dominie.data.tokenization import Encoded


def row(*tokens: int, answer: int) -> Encoded:
    """A conversation whose last `answer` tokens are supervised."""
    return Encoded(list(tokens), [False] * (len(tokens) - answer) + [True] * answer)


ROWS = [
    (0, row(1, 2, 3, answer=2)),
    (1, row(4, 5, 6, 7, 8, answer=1)),
    (0, row(9, 8, answer=2)),
    (1, row(3, 3, 3, 3, answer=3)),
]


def test_labels_are_the_next_token_where_that_token_is_supervised():
    batch = collate(ROWS[:2])
    assert batch.labels.tolist() == [
        [2, 3, IGNORED, IGNORED, IGNORED],
        [IGNORED, IGNORED, IGNORED, 8, IGNORED],
    ]
    assert batch.source_ids.tolist() == [[0, 0, 0, -1, -1], [1, 1, 1, 1, 1]]
    assert "position_ids" not in batch.model_inputs()


def test_a_supervised_first_token_is_nobodys_prediction():
    assert collate([ROWS[2]]).labels.tolist() == [[8, IGNORED]]


def conversations(batch: Batch) -> list[tuple[int, tuple[int, ...], tuple[int, ...]]]:
    found = []
    for r in range(len(batch.input_ids)):
        for segment in batch.segment_ids[r].unique().tolist():
            where = (batch.segment_ids[r] == segment) & (batch.source_ids[r] >= 0)
            if where.any():
                assert batch.position_ids[r][where].tolist() == list(range(int(where.sum())))
                source = batch.source_ids[r][where].unique()
                assert len(source) == 1
                ids, labels = batch.input_ids[r][where], batch.labels[r][where]
                found.append((int(source), tuple(ids.tolist()), tuple(labels.tolist())))
    return sorted(found)


@pytest.mark.parametrize("pack_to", [5, 7, 100])
def test_packing_keeps_every_conversation_as_padding_does(pack_to: int):
    packed = collate(ROWS, pack_to=pack_to)
    assert conversations(packed) == conversations(collate(ROWS))
    assert packed.input_ids.shape[1] <= pack_to
    assert "position_ids" in packed.model_inputs()


@pytest.mark.parametrize(
    ("device", "longest", "at_most", "length"),
    [
        ("cpu", 130, 2048, 130),
        ("cuda", 130, 2048, 256),
        ("cuda", 256, None, 256),
        ("cuda", 1990, 2000, 2000),  # no position that a model has not
        ("cuda", 12, 8, 12),  # what is there is not cut
    ],
)
def test_rows_are_as_long_as_the_longest_and_rounded_up_on_a_gpu(device, longest, at_most, length):
    assert Padding.on(torch.device(device), at_most).length(longest) == length


@pytest.mark.parametrize("pack_to", [None, 7])
def test_longer_rows_hold_the_same_and_padding(pack_to: int | None):
    short = collate(ROWS, pack_to=pack_to)
    longer = collate(ROWS, pack_to=pack_to, padding=Padding(8, 100))
    assert longer.input_ids.shape == (len(short.input_ids), 8)
    assert conversations(longer) == conversations(short)
    assert int((longer.source_ids >= 0).sum()) == int((short.source_ids >= 0).sum())
    assert torch.equal(longer.positions % 8, short.positions % short.input_ids.shape[1])


@pytest.mark.parametrize("pack_to", [None, 5, 7, 100])
@pytest.mark.parametrize("rows", [None, [1], [1, 0]])
def test_lengths_of_segments_are_those_of_the_ids(pack_to: int | None, rows: list[int] | None):
    batch = collate(ROWS, pack_to=pack_to)
    if rows is not None and max(rows) < len(batch.input_ids):
        batch = batch.select(rows)
    for each in (batch, joined([batch, collate(ROWS, pack_to=9)])):
        lengths = []
        for ids in each.segment_ids.masked_fill(each.source_ids < 0, -1):  # all padding is one
            lengths += torch.unique_consecutive(ids, return_counts=True)[1].tolist()
        assert each.segment_lengths == lengths


def test_a_conversation_of_no_tokens_is_no_segment():
    assert collate([ROWS[0], (0, row(answer=0)), ROWS[2]], pack_to=9).segment_lengths == [3, 2]


def test_conversations_of_two_routes_never_share_a_row():
    packed = collate(ROWS, routes=[0, 1], pack_to=100)
    assert len(packed.input_ids) < len(ROWS), "some do"
    for r in range(len(packed.input_ids)):
        assert len(packed.source_ids[r][packed.source_ids[r] >= 0].unique()) == 1


def test_padding_is_a_segment_of_its_own():
    packed = collate(ROWS, routes=[0, 1], pack_to=100)
    padding = packed.source_ids < 0
    assert padding.any()
    for r in range(len(padding)):
        real = set(packed.segment_ids[r][~padding[r]].tolist())
        assert real.isdisjoint(packed.segment_ids[r][padding[r]].tolist())


def test_select_keeps_rows_and_length():
    batch = collate(ROWS)
    chosen = batch.select([2, 0])
    assert torch.equal(chosen.input_ids, batch.input_ids[[2, 0]])
    assert torch.equal(chosen.labels, batch.labels[[2, 0]])


@pytest.mark.parametrize("pack_to", [None, 7, 100])
def test_spans_say_without_the_tensors_what_the_tensors_say(pack_to):
    one, two = (collate(ROWS[i : i + 3], routes=[0, 1], pack_to=pack_to) for i in (0, 1))
    rows = list(range(len(one.input_ids)))
    batches = [one, one.select(rows[::-1]), one.supervised_by(1), joined([one, two])]
    for batch in [*batches, Batch.from_dict(joined([two, one]).as_dict()).to("cpu")]:
        found = []
        for span in batch.spans:
            place = span.row, slice(span.start, span.start + span.tokens)
            assert batch.input_ids[place].tolist() == span.input_ids.tolist()
            assert set(batch.source_ids[place].tolist()) == {span.source}
            assert (batch.labels[place] != IGNORED).tolist() == span.taught.tolist()
            assert span.supervised == span.taught.sum()
            found.append(span.tokens)
        assert sum(found) == (batch.source_ids >= 0).sum()
        assert batch.positions.tolist() == batch.supervised.flatten().nonzero()[:, 0].tolist()
        assert batch.supervised_by_row == batch.supervised.sum(1).tolist()
        segments = batch.segment_ids.masked_fill(batch.source_ids < 0, 0).amax(1)
        assert batch.packed == bool(segments.any()), "where a row holds several, not where it may"
    assert one.select(rows) is one


@dataclass(frozen=True)
class Weighted:
    input_ids: list[int]
    supervised: list[bool]
    weights: list[float]


def test_weights_go_with_their_tokens_through_every_form_of_a_batch():
    one = Weighted([1, 2, 3], [False, True, True], [9.0, 0.5, 2.0])
    plain = Encoded([4, 5], [False, True])
    assert collate([(0, plain)]).weights is None, "nothing is multiplied where nothing is said"
    batch = collate([(0, one), (1, plain)])
    assert batch.weights is not None
    assert batch.weights.tolist() == [[0.5, 2.0, 1.0], [1.0, 1.0, 1.0]]
    packed = collate([(0, one), (0, plain)], pack_to=8)
    assert packed.weights is not None
    assert packed.weights.tolist() == [[0.5, 2.0, 1.0, 1.0, 1.0]]
    again = Batch.from_dict(batch.as_dict()).to("cpu").select([0])
    assert again.weights is not None
    assert again.weights.tolist() == [[0.5, 2.0, 1.0]]
    both = joined([collate([(0, plain)]), batch])
    assert both.weights is not None
    assert both.weights.tolist() == [[1.0, 1.0, 1.0], [0.5, 2.0, 1.0], [1.0, 1.0, 1.0]]
    assert "weights" not in collate([(0, plain)]).as_dict()


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
