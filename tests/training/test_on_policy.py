"""Steps in which the student answers: which conversations, exact after any kill, at any batch."""

from __future__ import annotations

import functools
import json
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, TrainerCallback

from dominie.core.errors import RunError
from dominie.core.io import read_checksummed, write_checksummed
from dominie.data.assistant_spans import ends_of_turn
from dominie.data.row_store import Row, turn_of
from dominie.losses.terms import Attention, LossTerms, Prediction
from dominie.toyworld.toy_models import word_tokenizer
from dominie.training import rollouts as rollouts_module
from dominie.training.rollouts import RolloutFiles, RolloutKey, RolloutSettings
from dominie.training.settings import Balance, Lora, TrainSettings
from dominie.training.stage_sources import StageSource, StageTraining
from dominie.training.train_stage import StageModels, Trained, train_stage

STEPS = 4
KD = LossTerms(prediction=Prediction())
SHORT = RolloutSettings(max_new_tokens=6)
GROWING = RolloutSettings(max_new_tokens=6, start_new_tokens=2, every=2)
ENDING = (3, 6)  # as the chat template of the tokenizer ends questions


class Killed(Exception):
    """Stands for a process that is gone."""


class KillAt(TrainerCallback):
    """Ends the process at the beginning of a step, or before its checkpoint is written."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == self.step:
            raise Killed


def rows_of(count: int, seed: int, *, answers: bool = True) -> list[Row]:
    """Rows that count upwards: a question of two to four tokens, its end, and an answer."""
    rng = np.random.default_rng(seed)
    rows = []
    for _ in range(count):
        prompt, answer, start = int(rng.integers(2, 5)), int(rng.integers(3, 8)), rng.integers(40)
        ids = [*range(start, start + prompt), *ENDING]
        supervised = [False] * len(ids)
        if answers:
            ids += range(start + prompt, start + prompt + answer)
            supervised += [True] * answer
        rows.append(Row([int(i) for i in ids], supervised))
    return rows


Train = Callable[..., Trained]


@pytest.fixture(scope="module")
def train(models) -> Train:
    """Trains in a folder on two sources: `data`, partly answered, and `prompts`."""

    def trained(
        folder: Path,
        *,
        fractions: Sequence[float] = (0.5, 1.0),
        rollouts: RolloutSettings = SHORT,
        terms: LossTerms = KD,
        shows: str | None = None,
        callbacks: Sequence[TrainerCallback] = (),
        **settings: Any,
    ) -> Trained:
        options = {
            "learning_rate": 1e-2,
            "steps": STEPS,
            "batch": 8,
            "micro_batch": 4,
            "max_length": 24,
            "checkpoint_every": 2,
            "log_every": 1,
            "arguments": {"use_cpu": True, "lr_scheduler_type": "constant", "warmup_steps": 0},
        }
        data = StageSource(
            name="data",
            train=rows_of(5, seed=1),
            validation=(),
            share=0.75,
            terms=terms,
            teacher="teacher",
            on_policy=fractions[0],
            shows=shows,
        )
        prompts = StageSource(
            name="prompts",
            train=rows_of(7, seed=2, answers=fractions[1] < 1),
            validation=(),
            share=0.25,
            terms=terms,
            teacher="teacher",
            on_policy=fractions[1],
        )
        return train_stage(
            StageTraining(
                folder=folder,
                sources=[data, prompts],
                settings=TrainSettings(**options | settings),
                rollouts=rollouts,
            ),
            StageModels(
                student=models["student"],
                tokenizer=word_tokenizer(),
                teachers={"teacher": models["teacher"]},
            ),
            callbacks=callbacks,
        )

    return trained


@pytest.fixture(scope="module")
def whole(train, tmp_path_factory) -> Callable[[int], Path]:
    """The folder of a stage that nothing interrupted, by `every`."""
    root = tmp_path_factory.mktemp("whole")

    @functools.cache
    def folder(every: int = 1) -> Path:
        train(root / str(every), rollouts=RolloutSettings(max_new_tokens=6, every=every))
        return root / str(every)

    return folder


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model" / "model.safetensors")


def assert_same_bits(one: Path, other: Path) -> None:
    theirs = weights(other)
    for name, tensor in weights(one).items():
        assert torch.equal(tensor, theirs[name]), name


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def answers_of(folder: Path) -> dict[RolloutKey, Any]:
    files = RolloutFiles(folder / "rollouts")
    return {k: r for step in files.steps() for k, r in files.read(step)[0].items()}


def test_answers_are_those_of_the_coin_and_end_the_prompt_of_their_row(whole):
    folder = whole()
    found, data = answers_of(folder), rows_of(5, seed=1)
    counted = Counter(key.source for key in found)
    assert counted["prompts"] == STEPS * 2  # all of them, a quarter of 8
    assert 0 < counted["data"] < STEPS * 6
    for key, rollout in found.items():
        if key.source == "data":
            assert key.uniform(0, "coin") < 0.5
            assert list(rollout.prompt) == turn_of(data[key.row]).prompt
        assert 1 <= len(rollout.answer) <= 6
        assert rollout.ended or len(rollout.answer) == 6
    assert any(key.copy for key in found)  # five rows, six places in a step
    for line in lines(folder):
        prompts, mixed = line["sources"]["prompts"], line["sources"]["data"]
        assert prompts["own"] == 1.0
        assert "divergence_data" not in prompts
        assert prompts["divergence"] == pytest.approx(prompts["divergence_own"], rel=1e-4)
        assert prompts["answer_cut"] + prompts["answer_ended"] == 1.0
        of = [r for k, r in found.items() if k.step == line["step"] and k.source == "prompts"]
        assert prompts["tokens"] == sum(len(r.answer) for r in of)
        assert prompts["answer_tokens"] == prompts["tokens"] / 2
        if 0 < mixed.get("own", 0.0) < 1:
            low, high = sorted((mixed["divergence_own"], mixed["divergence_data"]))
            assert low <= mixed["divergence"] <= high


def test_first_answers_and_divergences_are_those_of_the_models_themselves(train, models, tmp_path):
    """Greedy answers one at a time, and KL(teacher ‖ student) of whole logits in float64."""
    greedy = RolloutSettings(max_new_tokens=6, temperature=0.0)
    train(tmp_path / "stage", steps=1, rollouts=greedy)
    files = RolloutFiles(tmp_path / "stage" / "rollouts")
    found, told = files.read(1)[0], files.divergences(1)
    student, teacher = (
        AutoModelForCausalLM.from_pretrained(models[name].path).double().eval()
        for name in ("student", "teacher")
    )
    assert told.keys() == found.keys()
    for key, rollout in found.items():
        ids, at = torch.tensor([[*rollout.prompt, *rollout.answer]]), len(rollout.prompt) - 1
        with torch.no_grad():
            own, other = (m(input_ids=ids).logits[0, at:-1] for m in (student, teacher))
        assert own.argmax(-1).tolist() == list(rollout.answer)
        kl = (other.softmax(-1) * (other.log_softmax(-1) - own.log_softmax(-1))).sum(-1)
        assert told[key] == pytest.approx(kl.tolist(), abs=2e-4)
        assert rollout.ended == (rollout.answer[-1] in ends_of_turn(word_tokenizer()))


def test_at_zero_it_is_the_run_without(train, tmp_path):
    train(tmp_path / "zero", fractions=(0.0, 0.0), rollouts=RolloutSettings(every=4), steps=2)
    train(tmp_path / "plain", fractions=(0.0, 0.0), steps=2)
    assert_same_bits(tmp_path / "zero", tmp_path / "plain")
    assert not (tmp_path / "zero" / "rollouts").exists()


KILLS = [  # how many steps have a set of answers, the step, and where in it the end comes
    (every, step, place)
    for every in (1, 2, 4)
    for step in range(STEPS)
    for place in ("optimiser", "before the file", "after the file")
    if place == "optimiser" or step % every == 0
]


@pytest.mark.parametrize(
    ("every", "step", "place"),
    [(4, 3, "optimiser"), *(pytest.param(*kill, marks=pytest.mark.full) for kill in KILLS)],
)
def test_a_run_that_is_killed_reads_its_answers_and_ends_in_the_same_bits(
    train, whole, tmp_path, monkeypatch, every, step, place
):
    settings, callbacks = RolloutSettings(max_new_tokens=6, every=every), [KillAt(step)]
    if place != "optimiser":
        callbacks, write = [], RolloutFiles.write

        def killed(self: RolloutFiles, first: int, *args: Any) -> None:
            if first != step + 1 or place == "after the file":
                write(self, first, *args)
            if first == step + 1:
                raise Killed

        monkeypatch.setattr(RolloutFiles, "write", killed)
    with pytest.raises(Killed):
        train(tmp_path / "cut", rollouts=settings, callbacks=callbacks)
    monkeypatch.undo()
    written = tmp_path / "cut" / "rollouts"
    before = {path.name: path.stat().st_mtime_ns for path in written.glob("*rank*")}
    assert before or place == "before the file"
    train(tmp_path / "cut", rollouts=settings)
    assert_same_bits(tmp_path / "cut", whole(every))
    for name, time in before.items():
        assert (written / name).stat().st_mtime_ns == time  # read, not generated again
    assert answers_of(tmp_path / "cut") == answers_of(whole(every))
    assert lines(tmp_path / "cut")[-1]["sources"] == lines(whole(every))[-1]["sources"]


@pytest.mark.full
@pytest.mark.parametrize("step", range(STEPS))
def test_so_does_one_whose_teacher_reads_answers_that_grow_longer(train, tmp_path, step):
    train(tmp_path / "whole", rollouts=GROWING, shows="7 {answer} 8")
    with pytest.raises(Killed):
        train(tmp_path / "cut", rollouts=GROWING, shows="7 {answer} 8", callbacks=[KillAt(step)])
    train(tmp_path / "cut", rollouts=GROWING, shows="7 {answer} 8")
    assert_same_bits(tmp_path / "cut", tmp_path / "whole")
    found = answers_of(tmp_path / "whole")
    assert found == answers_of(tmp_path / "cut")
    longest = {step: max(len(found[k].answer) for k in found if k.step == step) for step in (1, 3)}
    assert longest[1] <= 2 < longest[3] <= 4


def test_answers_that_are_damaged_or_of_other_weights_are_generated_anew(train, whole, tmp_path):
    with pytest.raises(Killed):
        train(tmp_path / "cut", callbacks=[KillAt(1)])
    first, second = sorted((tmp_path / "cut" / "rollouts").glob("*rank*"))
    first.write_text(first.read_text()[:-40])
    record = read_checksummed(second)
    write_checksummed(second, record | {"weights": "0" + record["weights"][1:]}, indent=None)
    train(tmp_path / "cut")
    assert_same_bits(tmp_path / "cut", whole())
    assert answers_of(tmp_path / "cut") == answers_of(whole())


def test_a_set_of_answers_serves_its_later_steps(whole):
    files = RolloutFiles(whole(4) / "rollouts")
    assert files.steps() == [1]
    found, hashes = files.read(1)
    assert {key.step for key in found} == {1, 2, 3, 4}
    assert len(hashes) == 1
    assert all(files.divergences(step) for step in (1, 2, 3, 4))


@pytest.mark.full
def test_a_full_disk_ends_the_run_and_the_next_one_goes_on(train, whole, tmp_path, monkeypatch):
    write = rollouts_module.write_checksummed

    def full(path: Path, *args: Any, **kwargs: Any) -> None:
        if path.name.startswith("step-00000004"):
            raise OSError(28, "No space left on device")
        write(path, *args, **kwargs)

    monkeypatch.setattr(rollouts_module, "write_checksummed", full)
    with pytest.raises(RunError, match="answers cannot be written"):
        train(tmp_path / "cut")
    monkeypatch.undo()
    train(tmp_path / "cut")
    assert_same_bits(tmp_path / "cut", whole())


@pytest.mark.parametrize(
    "changed",
    [
        {"terms": LossTerms(prediction=Prediction(kind="reverse_kl"), attention=Attention())},
        pytest.param(
            {
                "terms": LossTerms(prediction=Prediction(kind="jsd")),
                "balance": Balance(by="tokens"),
            },
            marks=pytest.mark.full,
        ),
        {"lora": Lora(r=2, target_modules=["q_proj"]), "packing": True},
        pytest.param(
            {"gradient_checkpointing": True, "mixing": "micro_batches"}, marks=pytest.mark.full
        ),
    ],
    ids=["attention", "balanced", "adapters_packed", "checkpointing"],
)
def test_every_kind_of_loss_and_training_takes_answers(train, tmp_path, changed):
    train(tmp_path / "stage", steps=1, fractions=(1.0, 1.0), **changed)
    found = lines(tmp_path / "stage")[-1]["sources"]
    assert found["data"]["own"] == 1.0
    assert found["data"]["divergence_own"] > 0
    if "balance" in changed:
        assert found["prompts"]["loss_share"] == pytest.approx(0.25, abs=1e-6)


def test_prompts_are_cut_before_a_turn():
    row = Row([1, 2, 3, 4, 5, 6, 7], [False, True, False, False, True, True, False])
    assert turn_of(row) == ([1, 2, 3, 4], [5, 6])
    assert turn_of(row, 0.2) == ([1], [2])
    assert turn_of(row, 0.9) == ([1, 2, 3, 4], [5, 6])
    assert turn_of(Row([1, 2], [False, False])) == ([1, 2], [])
    assert turn_of(Row([1, 2], [False, True])) == ([1], [2])


def test_the_oldest_files_go_if_they_are_many(tmp_path, monkeypatch):
    files = RolloutFiles(tmp_path)
    for step in range(1, 11):
        files.write(step, 0, "a", [])
    monkeypatch.setattr(rollouts_module, "MOST_BYTES", 5 * next(tmp_path.iterdir()).stat().st_size)
    files.prune(None)
    files.prune(1)
    assert files.steps() == list(range(1, 11))
    files.prune(8)  # steps 5 to 7 may be part of what step 8 reads
    assert files.steps() == list(range(5, 11))


def test_settings_are_checked():
    for bad in ({"every": 5}, {"top_p": 0.0}, {"temperature": -1.0}, {"max_new_tokens": 0}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            RolloutSettings(**bad)
