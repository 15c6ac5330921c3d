"""What a step reads: the conversations of the mix, however they are laid out and shared."""

import json
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pytest
import torch
from accelerate.data_loader import BatchSamplerShard, SkipBatchSampler
from tiny import tiny_model
from transformers import TrainerCallback

from dominie.data.batch import Batch, collate
from dominie.data.tokenization import Encoded
from dominie.models.info import model_flops
from dominie.training import dataloader
from dominie.training.checkpoints import newest_checkpoint
from dominie.training.dataloader import (
    Collator,
    FixedRows,
    MicroBatches,
    MicroBatchSampler,
    Mix,
    total_conversations,
)
from dominie.training.settings import TrainSettings, training_arguments
from dominie.training.stage_sources import StageSource, StageTraining
from dominie.training.train_stage import LoadedModels, build_trainer

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


@pytest.mark.parametrize("ranks", [1, 2])
def test_what_a_step_begins_with_is_known_before_it(ranks, monkeypatch):
    batches = MicroBatches(FixedRows(rows(), mix_of("conversations"), Collator([0, 1], 60)))
    monkeypatch.setattr(dataloader, "world_size", lambda: ranks)
    for number in range(ranks):
        monkeypatch.setattr(dataloader, "rank", lambda number=number: number)
        read = list(read_by(number, ranks, "conversations", 60))
        each = len(read) // STEPS
        for step in range(STEPS):
            expected = [s for batch in read[each * step : each * step + 2] for s in batch.spans]
            found = batches.first_spans(step, 2)
            assert [s.input_ids.tolist() for s in found] == [s.input_ids.tolist() for s in expected]
        assert batches.first_spans(STEPS, 2) == []


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


class FreshRows:
    """A second step source: rows that are made when a step asks for them, as rollouts are."""

    sources, steps, micro_batches, one_source_per_step = ("made",), 6, 2, False

    def __init__(self) -> None:
        self.made: list[int] = []

    def __len__(self) -> int:
        return self.steps * 8

    def micro_batch(self, step: int, number: int) -> Batch:
        self.made.append(step)
        rng = np.random.default_rng([step, number])
        return collate([(0, Encoded(rng.integers(0, 61, 6).tolist(), [True] * 6)) for _ in "four"])

    def conversations(self, step: int) -> list[dict[str, Any]]:
        return [{"source": "made", "row": 8 * step + row, "tokens": 6} for row in range(8)]


def test_another_step_source_trains_and_goes_on_where_it_was_cut_off(tmp_path):
    def trained(folder: Path, stop_at: int | None = None) -> tuple[dict[str, Any], FreshRows]:
        class Stop(TrainerCallback):
            def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
                control.should_training_stop |= state.global_step == stop_at

        settings = TrainSettings(
            steps=FreshRows.steps, batch=8, micro_batch=4, checkpoint_every=1, log_every=1,
            learning_rate=1e-2, arguments={"use_cpu": True},
        )  # fmt: skip
        source = StageSource(
            name="made", train=[Encoded([1, 2], [True] * 2)], validation=(), share=1.0
        )
        stage = StageTraining(folder=folder, sources=[source], settings=settings)
        arguments = training_arguments(settings, folder / "checkpoints", steps=6, ranks=1)
        model, steps = tiny_model(seed=3), FreshRows()
        models = LoadedModels(student=model, flops=model_flops(model))
        with build_trainer(stage, models, arguments, steps=steps, callbacks=[Stop()]) as trainer:
            trainer.resume(newest_checkpoint(folder / "checkpoints")[0])
        return {name: tensor.clone() for name, tensor in model.state_dict().items()}, steps

    whole, steps = trained(tmp_path / "whole")
    assert steps.made == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5]
    trained(tmp_path / "cut", stop_at=3)
    weights, steps = trained(tmp_path / "cut")
    assert set(steps.made) == {3, 4, 5}, "what was learnt is not made again"
    assert all(torch.equal(whole[name], weights[name]) for name in whole)
    lines = [json.loads(line) for line in (tmp_path / "cut" / "metrics.jsonl").open()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert lines[-1]["tokens"] == 6 * 8 * 5


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
