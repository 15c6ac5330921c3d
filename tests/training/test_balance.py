"""With `balance: tokens` a share is one of the loss: in gradients, over layouts, on resume."""

from __future__ import annotations

import json
import logging
from copy import deepcopy
from typing import Any

import numpy as np
import pytest
import torch
from gradients import ORACLE, assert_equal_gradients, naive_gradient, ragged_rows, weighted
from tiny import tiny_folder
from transformers import TrainerCallback

from dominie.data.tokenization import Encoded
from dominie.losses.terms import Attention, LossTerms, NextToken, Prediction
from dominie.models.spec import Model
from dominie.teachers import LocalTeacher, RoutedTeacher
from dominie.toyworld.toy_models import word_tokenizer
from dominie.training.settings import Balance, TrainSettings
from dominie.training.source_weights import (
    SourceWeights,
    following,
    planned_shares,
    share_lines,
    token_weights,
)
from dominie.training.stage_sources import StageSource, StageTraining
from dominie.training.train_stage import StageModels, train_stage

TOKENS = Balance(by="tokens", cap=1e6)
PLAIN = Balance(by="conversations")


# The weights ---------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(20))
def test_weights_give_each_source_its_share_and_their_sum_stays(seed):
    rng = np.random.default_rng(seed)
    count = int(rng.integers(1, 6))
    shares, tokens = rng.dirichlet(np.ones(count)).tolist(), rng.integers(0, 500, count)
    tokens[rng.random(count) < 0.2], tokens[0] = 0, 1
    total, present = int(tokens.sum()), tokens > 0
    whole = sum(g for g, here in zip(shares, present, strict=True) if here)
    weights = token_weights(shares, tokens.tolist(), cap=1e9)
    for g, n, w in zip(shares, tokens.tolist(), weights, strict=True):
        assert w == pytest.approx(g / whole * total / n if n else 1.0, rel=1e-12)
    capped = token_weights(shares, tokens.tolist(), cap=2.0)
    assert max(capped) <= 2.0
    for found in (weights, capped):
        assert sum(np.array(found) * tokens) == pytest.approx(total, rel=1e-12)


def test_what_the_cap_takes_from_one_source_the_others_share_by_their_shares():
    weights = token_weights([0.5, 0.4, 0.1], [1, 50, 49], cap=20.0)
    assert weights == pytest.approx([20.0, 0.8 * 80 / 50, 0.2 * 80 / 49])
    # The second is above the cap only after it has got its part of what the first lacks.
    weights = token_weights([0.5, 0.2, 0.3], [1, 10, 89], cap=2.0)
    assert weights == pytest.approx([2.0, 2.0, 78 / 89])


def test_a_gap_moves_shares_among_experts_and_their_sum_stays():
    shares = [0.2, 0.2, 0.6]
    moved = following(shares, {0: 0.1, 1: 0.3}, 1.0, {0, 1, 2})
    assert moved == pytest.approx([0.1, 0.3, 0.6])
    assert following(shares, {0: 0.1, 1: 0.3}, 2.0, {0, 1, 2}) == pytest.approx([0.04, 0.36, 0.6])
    assert following(shares, {0: 0.1, 1: 0.3}, 1.0, {0, 2}) == pytest.approx(shares)
    assert following(shares, {0: 0.0, 1: -0.1}, 1.0, {0, 1}) == shares, "no gap is left"
    least, most = following(shares, {0: 0.0, 1: 1.0}, 9.0, {0, 1})[:2]
    assert most / least == pytest.approx(20.0 / 0.05)


def test_a_gap_is_the_mean_over_the_tokens_of_all_ranks_and_micro_batches():
    columns = ["tokens", "taught", "divergence"]
    sums = torch.tensor([[9.0, 9.0, 99.0], [4.0, 3.0, 0.9], [2.0, 1.0, 0.7], [0.0, 0.0, 0.0]])
    ranks = [
        SourceWeights(list("rabc"), [0.25] * 4, Balance(by="tokens", gap=1.0), experts=[1, 2, 3])
        for _ in range(2)
    ]
    for micro_batch in range(3):
        for number, rank in enumerate(ranks):
            rank.measure(sums * (1 + number) * (1 + micro_batch), columns)
    for rank in ranks:  # one has a third of the sums, the other two
        rank.end_step(lambda part: part * 3 if part[1, 0] == pytest.approx(5.4) else part * 1.5)
        assert rank.gaps == pytest.approx({"a": 0.3, "b": 0.7}), "c was not there, r has no expert"
        rank.measure(sums.flip(0), columns)  # c has tokens now, and a and b are other ones
        rank.end_step(lambda part: part)
        assert rank.gaps == pytest.approx({"a": 0.27 + 0.07, "b": 0.63 + 0.03, "c": 11.0})


def test_a_capped_weight_is_said_once(caplog):
    weights = SourceWeights(["short", "long"], [0.5, 0.5], Balance(by="tokens"))
    with caplog.at_level(logging.WARNING):
        for step in (1, 2):
            assert weights.of_step([1, 99], step=step)[0] == 20.0
    (said,) = caplog.messages
    assert "step 1: the 1 supervised tokens of short" in said
    assert "capped at 20" in said


# The gradient --------------------------------------------------------------------------------

PAIRS = [(0, 0), (1, 1)]
LONG = LossTerms(
    next_token=NextToken(weight=0.3), prediction=Prediction(weight=0.7), attention=Attention()
)
SHORT = LossTerms(
    next_token=NextToken(weight=1.0), prediction=Prediction(weight=2.0), attention=Attention()
)
SHARES = [0.2, 0.5, 0.2, 0.1]


def sources() -> list[list[Any]]:
    """Four sources: many tokens, some of other weights; few; one; none."""
    one = Encoded([5, 6, 7, 8], [False, False, False, True])
    none = Encoded([9, 10, 11], [False, False, False])
    return [weighted(ragged_rows(8, 1), 7), ragged_rows(2, 2), [one], [none]]


@pytest.mark.parametrize(
    ("micro_batch", "pack_to", "norms"), [(12, None, True), (3, None, False), (4, 40, True)]
)
def test_the_loss_is_the_mean_of_the_sources_means_by_share(
    student, teacher_model, step_gradient, tmp_path, micro_batch, pack_to, norms
):
    """Against the formulas by hand, in every term; a source without tokens takes no part."""
    teacher = RoutedTeacher(
        {"t": LocalTeacher(teacher_model, attention_layers=[0, 1])}, ["t"] * len(SHARES)
    )
    rows, terms = sources(), [LONG, SHORT, SHORT, SHORT]
    found = step_gradient(
        student, rows, terms, teacher=teacher, pairs=PAIRS, micro_batch=micro_batch,
        pack_to=pack_to, source_gradients=norms,
        balance=SourceWeights(list("0123"), SHARES, TOKENS),
    )  # fmt: skip
    present = sum(SHARES[:3])
    parts = [
        {n: g * share / present for n, g in naive_gradient(student, teacher_model, *each).items()}
        for share, *each in zip(SHARES[:3], rows, terms, strict=False)
    ]
    expected = {name: sum(part[name] for part in parts) for name in parts[0]}
    assert_equal_gradients(found, expected, ORACLE)
    line = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[0])
    loss_shares = [line["sources"].get(name, {}).get("loss_share") for name in "0123"]
    assert loss_shares == [*(pytest.approx(g / present, abs=1e-6) for g in SHARES[:3]), None]
    if norms:
        for name, part in zip("012", parts, strict=True):
            norm = torch.cat([g.flatten() for g in part.values()]).norm()
            assert line["sources"][name]["grad_norm"] == pytest.approx(float(norm), rel=1e-5)


def test_layouts_agree_to_the_last_digits_and_conversations_weigh_nothing(
    student, teacher_model, step_gradient
):
    teacher = RoutedTeacher(
        {"t": LocalTeacher(teacher_model, attention_layers=[0, 1])}, ["t"] * len(SHARES)
    )

    def gradient(balance: Balance, **layout: Any) -> dict[str, torch.Tensor]:
        weights = SourceWeights(list("0123"), SHARES, balance)
        return step_gradient(
            student, sources(), [LONG, SHORT, SHORT, SHORT], teacher=teacher, pairs=PAIRS,
            balance=weights, **layout,
        )  # fmt: skip

    whole = gradient(TOKENS, micro_batch=12)
    assert_equal_gradients(gradient(TOKENS, micro_batch=1), whole)
    assert_equal_gradients(gradient(TOKENS, micro_batch=6, pack_to=64), whole)
    plain = gradient(PLAIN, micro_batch=12)
    name = "lm_head.weight"
    assert (plain[name] - whole[name]).norm() > 0.1 * whole[name].norm()


# A stage -------------------------------------------------------------------------------------


class Crash(Exception):
    pass


class CrashAfter(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            raise Crash


def counting(count: int, length: int) -> list[Encoded]:
    """Conversations of three tokens that are read and some that are learnt."""
    flags = [False] * 3 + [True] * length
    return [Encoded([(7 * i + j) % 60 for j in range(3 + length)], flags) for i in range(count)]


@pytest.fixture
def stage(tmp_path):
    """Trains a stage of two experts' sources and a reference's, whose answers differ in length."""
    folders = {name: tiny_folder(tmp_path / name, seed=i) for i, name in enumerate("sab")}
    models = {name: Model(path=str(folder)) for name, folder in folders.items()}
    taught = LossTerms(prediction=Prediction())
    rows = {"shop": counting(12, 1), "law": counting(12, 3), "general": counting(24, 20)}
    teachers = {"shop": "a", "law": "b", "general": "s"}
    shares = {"shop": 0.25, "law": 0.25, "general": 0.5}

    def run(name: str, balance: Balance, *callbacks: TrainerCallback) -> Any:
        settings = TrainSettings(
            learning_rate=1e-2, steps=6, batch=8, micro_batch=4, max_length=32, balance=balance,
            checkpoint_every=1, log_every=1, arguments={"use_cpu": True},
        )  # fmt: skip
        found = [
            StageSource(
                name=source, train=rows[source], validation=(), share=share, terms=taught,
                teacher=teachers[source], reference=source == "general",
            )
            for source, share in shares.items()
        ]  # fmt: skip
        return train_stage(
            StageTraining(folder=tmp_path / name, sources=found, settings=settings),
            StageModels(student=models["s"], tokenizer=word_tokenizer(), teachers=deepcopy(models)),
            callbacks=callbacks,
        )

    run.folder = tmp_path  # type: ignore[attr-defined]
    return run


def lines_of(folder: Any) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_shares_of_tokens_and_of_the_loss_are_recorded(stage):
    plain = stage("plain", PLAIN)
    assert plain.loss_shares == pytest.approx(plain.token_shares, abs=1e-3)
    assert plain.loss_shares["shop"] < 0.25 / 3
    balanced = stage("balanced", TOKENS)
    assert balanced.token_shares == plain.token_shares
    assert balanced.loss_shares == pytest.approx({"shop": 0.25, "law": 0.25, "general": 0.5})


def test_a_followed_gap_is_resumed_to_the_bit_and_leaves_the_reference_its_share(stage):
    follow = Balance(by="tokens", gap=1.0)
    stage("whole", follow)
    with pytest.raises(Crash):
        stage("cut", follow, CrashAfter(3))
    stage("cut", follow)
    models = [stage.folder / name / "model" / "model.safetensors" for name in ("whole", "cut")]
    assert models[0].read_bytes() == models[1].read_bytes()
    kept = ("shop", "law", "general")
    whole, cut = (lines_of(stage.folder / name) for name in ("whole", "cut"))
    for one, other in zip(whole, cut, strict=True):
        assert [one["sources"][s] for s in kept] == [other["sources"][s] for s in kept]
    first, *later = (line["sources"] for line in whole)
    assert [first[s]["loss_share"] for s in kept] == pytest.approx([0.25, 0.25, 0.5], abs=1e-6)
    before = first
    for each in later:
        gaps = {name: before[name]["gap"] for name in ("shop", "law")}
        assert each["shop"]["loss_share"] == pytest.approx(
            0.5 * gaps["shop"] / sum(gaps.values()), abs=1e-5
        )
        for name in gaps:
            mean = 0.9 * gaps[name] + 0.1 * each[name]["divergence"]
            assert each[name]["gap"] == pytest.approx(mean, rel=1e-5)
        assert each["general"]["loss_share"] == pytest.approx(0.5, abs=1e-6)
        assert "gap" not in each["general"]
        before = each


# What is said --------------------------------------------------------------------------------


def said(settings: TrainSettings, *given: tuple[str, float, int]) -> list[str]:
    rows = [
        StageSource(name=name, train=counting(50, length), validation=(), share=share)
        for name, share, length in given
    ]
    return list(share_lines("align", planned_shares(rows, settings), settings))


def test_three_shares_are_told_and_a_loss_that_is_not_the_share_is_warned_of():
    mix = [("shop", 0.15, 2), ("general", 0.85, 130)]
    plain, warning = said(TrainSettings(batch=100, balance=PLAIN), *mix)
    assert plain == (
        "align: shares of conversations, tokens and loss: shop 15 %, 0.271 %, 0.271 %; "
        "general 85 %, 99.7 %, 99.7 %"
    )
    assert warning == (
        "warning: align: shop is 15 % of the conversations and 0.271 % of the loss; set "
        "train.balance: tokens to make its share one of the loss"
    )
    (balanced,) = said(TrainSettings(batch=100, balance=TOKENS), *mix)
    assert "shop 15 %, 0.271 %, 15 %" in balanced
    _, capped = said(TrainSettings(batch=100, balance=Balance(by="tokens", cap=2.0)), *mix)
    assert "its weight is capped: raise train.batch" in capped
    assert said(TrainSettings(), ("shop", 1.0, 2)) == []


def test_a_step_of_one_source_is_balanced_as_it_is():
    mix = [("shop", 0.15, 2), ("general", 0.85, 130)]
    for balance in (PLAIN, TOKENS):
        settings = TrainSettings(batch=10, steps=200, mixing="steps", balance=balance)
        (line,) = said(settings, *mix)
        assert "shop 15 %, 0.271 %, 15 %" in line
