"""What a step reads: the conversations of the mix, however they are laid out and shared."""

import pickle
from collections.abc import Iterator
from typing import NoReturn

import numpy as np
import pytest
from accelerate.data_loader import BatchSamplerShard, SkipBatchSampler

from dominie.data.batch import Batch
from dominie.data.sampling import Mix
from dominie.data.tokenization import Encoded
from dominie.training.dataloader import Collator, FixedRows, MicroBatches, MicroBatchSampler

SIZES = {"a": 37, "b": 5}
STEPS, BATCH, MICRO_BATCH = 9, 12, 2


def mix_of(mixing: str) -> Mix:
    shares = {"a": 0.7, "b": 0.3}
    return Mix(
        SIZES, shares, batch=BATCH, micro_batch=MICRO_BATCH, steps=STEPS, seed=3, mixing=mixing
    )


def rows() -> dict[str, list[Encoded]]:
    """Rows whose first token names them: source and number in it."""
    lengths = np.random.default_rng(0).integers(2, 30, (2, 37))
    return {
        name: [
            Encoded([100 * source + row] + [1] * n, [False] + [True] * n)
            for row, n in enumerate(lengths[source][:count])
        ]
        for source, (name, count) in enumerate(SIZES.items())
    }


def read_by(rank: int, ranks: int, mixing: str, pack_to: int | None) -> Iterator[Batch]:
    source = FixedRows(rows(), mix_of(mixing), Collator([0, 1], pack_to))
    batches = MicroBatches(source)
    for (place,) in BatchSamplerShard(MicroBatchSampler(source), ranks, rank):
        yield Batch.from_dict(batches[place])


def names(batch: Batch) -> list[tuple[int, int]]:
    """Source and number of the conversations of a batch."""
    starts = (batch.position_ids == 0) & (batch.source_ids >= 0)
    pairs = zip(batch.source_ids[starts].tolist(), batch.input_ids[starts].tolist(), strict=True)
    return [(source, first - 100 * source) for source, first in pairs]


@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("pack_to", [None, 60])
@pytest.mark.parametrize("mixing", ["conversations", "micro_batches", "steps"])
def test_ranks_share_the_conversations_of_each_step_out(mixing, pack_to, ranks):
    read = [[names(batch) for batch in read_by(r, ranks, mixing, pack_to)] for r in range(ranks)]
    each = BATCH // MICRO_BATCH // ranks
    assert all(len(batches) == STEPS * each for batches in read)
    for number, step in enumerate(mix_of(mixing)):
        shared = [batches[each * number : each * (number + 1)] for batches in read]
        assert sorted(c for rank in shared for batch in rank for c in batch) == sorted(step)


def test_a_micro_batch_that_is_a_turn_has_one_source():
    for batch in read_by(0, 1, "micro_batches", 60):
        assert len({source for source, _ in names(batch)}) == 1


def test_what_a_resumed_run_has_learnt_is_passed_over_unread():
    class Unread:
        def __len__(self) -> int:
            return 37

        def __getitem__(self, index: object) -> NoReturn:
            raise AssertionError(f"{index} is read")

    source = FixedRows(
        {"a": Unread(), "b": Unread()}, mix_of("conversations"), Collator([0, 0], 60)
    )
    left = list(SkipBatchSampler(MicroBatchSampler(source), skip_batches=30))
    assert len(left) == STEPS * BATCH // MICRO_BATCH - 30
    with pytest.raises(AssertionError, match="is read"):
        MicroBatches(source)[left[0][0]]


def test_a_step_is_the_same_whatever_was_asked_before():
    source = FixedRows(rows(), mix_of("conversations"), Collator([0, 0], 60))
    forwards = [names(source.micro_batch(step, 3)) for step in range(STEPS)]
    copy = pickle.loads(pickle.dumps(source))  # as a worker process gets it
    backwards = [names(copy.micro_batch(step, 3)) for step in reversed(range(STEPS))]
    assert backwards[::-1] == forwards
    listed = source.conversations(4)
    assert [(("a", "b").index(each["source"]), each["row"]) for each in listed] == list(
        mix_of("conversations")
    )[4]
