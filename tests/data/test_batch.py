"""Batches: what is supervised, what shares a row, and nothing lost in packing."""

from dataclasses import dataclass

import numpy as np
import pytest
import torch

from dominie.data.batch import IGNORED, Batch, collate, joined
from dominie.data.sampling import Mix, total_conversations
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
    chosen = batch.select(torch.tensor([2, 0]))
    assert torch.equal(chosen.input_ids, batch.input_ids[[2, 0]])
    assert torch.equal(chosen.labels, batch.labels[[2, 0]])


def drawn(mix: Mix) -> list[tuple[int, int]]:
    return [pair for step in mix for pair in step]


@pytest.mark.parametrize("seed", range(5))
def test_shares_hold_to_within_one_conversation_after_every_step(seed: int):
    rng = np.random.default_rng(seed)
    shares = rng.dirichlet(np.ones(1 + seed))
    names = [str(i) for i in range(len(shares))]
    mix = Mix(
        dict.fromkeys(names, 11),
        dict(zip(names, shares.tolist(), strict=True)),
        batch=8,
        micro_batch=4,
        steps=60,
        seed=seed,
    )
    sources = np.array([source for source, _ in drawn(mix)])
    assert len(sources) == 480
    for step in range(1, 61):
        counts = np.bincount(sources[: step * 8], minlength=len(shares))
        assert np.abs(counts - shares * step * 8).max() < 1.0


@pytest.mark.parametrize("mixing", ["conversations", "micro_batches", "steps"])
@pytest.mark.parametrize("domain", [0.01, 0.1, 0.3])
def test_shares_are_exact_over_the_run_however_sources_take_turns(mixing, domain):
    steps, batch, micro_batch = 200, 8, 4
    mix = Mix(
        {"general": 50, "domain": 7},
        {"general": 1 - domain, "domain": domain},
        batch=batch,
        micro_batch=micro_batch,
        steps=steps,
        seed=0,
        mixing=mixing,
    )
    size = {"conversations": 1, "micro_batches": micro_batch, "steps": batch}[mixing]
    turns = np.array([source for source, _ in drawn(mix)]).reshape(-1, batch)
    if mixing != "conversations":
        turns = turns.reshape(-1, size)
        assert (turns == turns[:, :1]).all(), "a turn is one source's"
    assert turns.sum() == pytest.approx(domain * steps * batch, abs=1e-9), "to the conversation"
    for step in range(1, steps + 1):
        given = turns.reshape(steps, batch)[:step].sum()
        assert abs(given - domain * step * batch) < size


def test_each_pass_takes_every_row_once_and_passes_differ():
    mix = Mix({"a": 10}, {"a": 1.0}, batch=5, micro_batch=5, steps=4, seed=3)
    rows = [row for _, row in drawn(mix)]
    first, second = rows[:10], rows[10:]
    assert sorted(first) == sorted(second) == list(range(10))
    assert first != second


def test_the_order_is_a_function_of_the_seed():
    def order(seed: int, micro_batch: int = 4):
        return drawn(
            Mix(
                {"a": 30, "b": 9},
                {"a": 0.9, "b": 0.1},
                batch=8,
                micro_batch=micro_batch,
                steps=9,
                seed=seed,
            )
        )

    assert order(0) == order(0) == order(0, micro_batch=2)
    assert order(0) != order(1)


def test_epochs_count_the_largest_source():
    assert total_conversations({"a": 900, "b": 10}, {"a": 0.9, "b": 0.1}, epochs=2) == 2000
    assert total_conversations({"a": 900, "b": 5000}, {"a": 1.0, "b": 0.0}, epochs=1) == 900


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
    again = Batch.from_dict(batch.as_dict()).to("cpu").select(torch.tensor([0]))
    assert again.weights is not None
    assert again.weights.tolist() == [[0.5, 2.0, 1.0]]
    both = joined([collate([(0, plain)]), batch])
    assert both.weights is not None
    assert both.weights.tolist() == [[1.0, 1.0, 1.0], [0.5, 2.0, 1.0], [1.0, 1.0, 1.0]]
    assert "weights" not in collate([(0, plain)]).as_dict()
