"""The gradient of an optimiser step does not depend on how its conversations are laid out."""

from __future__ import annotations

import json
from copy import deepcopy
from typing import Any

import pytest
import torch
from gradients import (
    ORACLE,
    WeightedRow,
    assert_equal_gradients,
    naive_gradient,
    ragged_rows,
    weighted,
)

from dominie.data.batch import Batch, collate
from dominie.losses.terms import Attention, LossTerms, NextToken, Prediction
from dominie.teachers import LocalTeacher, RoutedTeacher

KD = LossTerms(
    next_token=NextToken(weight=0.3),
    prediction=Prediction(weight=0.7, temperature=2.0),
    attention=Attention(weight=1.5),
)
PAIRS = [(0, 0), (1, 1)]


@pytest.fixture
def taught(teacher_model: Any) -> RoutedTeacher:
    return RoutedTeacher({"t": LocalTeacher(teacher_model, attention_layers=[0, 1])}, ["t"])


def test_the_gradient_is_that_of_the_formulas(student, teacher_model, taught, step_gradient):
    rows = ragged_rows(8)
    expected = naive_gradient(student, teacher_model, rows, KD)
    found = step_gradient(student, [rows], [KD], teacher=taught, pairs=PAIRS)
    assert_equal_gradients(found, expected, ORACLE)


def test_so_it_is_where_both_are_mixtures_of_experts(teacher_model, taught, step_gradient):
    torch.manual_seed(5)
    config = deepcopy(teacher_model.config)
    config.num_local_experts = 2
    student = type(teacher_model)(config).double()
    rows = ragged_rows(8)
    expected = naive_gradient(student, teacher_model, rows, KD)
    found = step_gradient(student, [rows], [KD], teacher=taught, pairs=PAIRS)
    assert any("experts" in name for name in found)
    assert_equal_gradients(found, expected, ORACLE)


@pytest.mark.parametrize(("micro_batch", "pack_to"), [(1, None), (2, None), (8, 30), (4, 64)])
def test_layout_does_not_change_the_gradient(student, taught, step_gradient, micro_batch, pack_to):
    rows = ragged_rows(8)
    whole = step_gradient(student, [rows], [KD], teacher=taught, pairs=PAIRS, micro_batch=8)
    found = step_gradient(
        student, [rows], [KD], teacher=taught, pairs=PAIRS, micro_batch=micro_batch, pack_to=pack_to
    )
    assert_equal_gradients(found, whole)


def test_gradient_checkpointing_does_not_change_the_gradient(student, taught, step_gradient):
    rows = ragged_rows(8)
    plain = step_gradient(student, [rows], [KD], teacher=taught, pairs=PAIRS, pack_to=40)
    recomputed = step_gradient(
        student, [rows], [KD], teacher=taught, pairs=PAIRS, pack_to=40, gradient_checkpointing=True
    )
    assert_equal_gradients(plain, recomputed)


@pytest.mark.parametrize("pack_to", [None, 40])
def test_each_source_follows_its_own_teacher_and_loss(
    student, teacher_model, step_gradient, pack_to
):
    """DAE with an untaught source beside it: the gradient is the sum of the parts'."""
    general, domain, labelled = ragged_rows(4, 1), ragged_rows(2, 2), ragged_rows(2, 3)
    expert = (
        type(teacher_model)(deepcopy(teacher_model.config)).double().eval().requires_grad_(False)
    )
    prediction = LossTerms(next_token=NextToken(weight=0.0), prediction=Prediction())
    labels = LossTerms(next_token=NextToken(weight=0.5), prediction=Prediction(weight=0.0))
    router = RoutedTeacher(
        {"reference": LocalTeacher(teacher_model), "expert": LocalTeacher(expert)},
        ["reference", "expert", None],
    )
    found = step_gradient(
        student, [general, domain, labelled], [prediction, prediction, labels],
        teacher=router, routes=[0, 1, 2], pack_to=pack_to, micro_batch=4,
    )  # fmt: skip
    counts = [sum(sum(r.supervised[1:]) for r in rows) for rows in (general, domain, labelled)]
    parts = [
        naive_gradient(student, teacher_model, general, prediction),
        naive_gradient(student, expert, domain, prediction),
        naive_gradient(student, teacher_model, labelled, labels),
    ]
    expected = {
        name: sum(c * part[name] for c, part in zip(counts, parts, strict=True)) / sum(counts)
        for name in parts[0]
    }
    assert_equal_gradients(found, expected, ORACLE)


@pytest.mark.parametrize("pack_to", [None, 40])
@pytest.mark.parametrize("micro_batch", [2, 8])
def test_the_gradient_of_each_source_is_its_part_of_the_step_s(
    student, teacher_model, step_gradient, tmp_path, pack_to, micro_batch
):
    """Against autograd by hand: every source weighs as its loss terms say."""
    general, domain = ragged_rows(5, 1), ragged_rows(3, 2)
    heavy = LossTerms(next_token=NextToken(weight=0.6), prediction=Prediction(weight=2.0))
    light = LossTerms(next_token=NextToken(weight=0.1), prediction=Prediction(weight=0.5))
    router = RoutedTeacher({"t": LocalTeacher(teacher_model)}, ["t", "t"])
    options = {"teacher": router, "pack_to": pack_to, "micro_batch": micro_batch}
    plain = step_gradient(student, [general, domain], [heavy, light], **options)
    (tmp_path / "metrics.jsonl").unlink()
    found = step_gradient(
        student, [general, domain], [heavy, light], **options, source_gradients=True
    )
    assert all(torch.equal(found[name], plain[name]) for name in plain), "measuring moves nothing"
    counts = [sum(sum(r.supervised[1:]) for r in rows) for rows in (general, domain)]
    parts = [
        naive_gradient(student, teacher_model, general, heavy),
        naive_gradient(student, teacher_model, domain, light),
    ]
    for part, count in zip(parts, counts, strict=True):
        for gradient in part.values():
            gradient *= count / sum(counts)
    whole = {name: parts[0][name] + parts[1][name] for name in parts[0]}
    assert_equal_gradients(found, whole, ORACLE)
    line = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[0])
    for source, part in zip(("0", "1"), parts, strict=True):
        assert line["sources"][source]["grad_norm"] == pytest.approx(norm(part), rel=1e-5)
    assert line["grad_norm"] == pytest.approx(norm(whole), rel=1e-5)


def norm(gradient: dict[str, torch.Tensor]) -> float:
    return float(torch.cat([g.flatten() for g in gradient.values()]).norm())


@pytest.mark.parametrize(("micro_batch", "pack_to"), [(8, None), (2, None), (4, 40), (8, 64)])
def test_every_term_is_multiplied_by_the_weights_of_its_tokens(
    student, teacher_model, step_gradient, micro_batch, pack_to
):
    """Two sources, one of them without weights; the denominator still counts supervised tokens."""
    general, domain = weighted(ragged_rows(5, 1), 7), ragged_rows(3, 2)
    light = LossTerms(
        next_token=NextToken(weight=0.1),
        prediction=Prediction(weight=0.5),
        attention=Attention(weight=0.4),
    )
    teacher = RoutedTeacher({"t": LocalTeacher(teacher_model, attention_layers=[0, 1])}, ["t", "t"])
    options = {"teacher": teacher, "pairs": PAIRS, "pack_to": pack_to, "micro_batch": micro_batch}
    found = step_gradient(student, [general, domain], [KD, light], **options)
    counts = [sum(sum(r.supervised[1:]) for r in rows) for rows in (general, domain)]
    parts = [
        naive_gradient(student, teacher_model, general, KD),
        naive_gradient(student, teacher_model, domain, light),
    ]
    expected = {
        name: sum(c * part[name] for c, part in zip(counts, parts, strict=True)) / sum(counts)
        for name in parts[0]
    }
    assert_equal_gradients(found, expected, ORACLE)


def test_weights_of_one_change_nothing(student, taught, step_gradient):
    rows = ragged_rows(8)
    ones = [WeightedRow(r.input_ids, r.supervised, [1.0] * len(r.input_ids)) for r in rows]
    plain = step_gradient(student, [rows], [KD], teacher=taught, pairs=PAIRS, pack_to=40)
    found = step_gradient(student, [ones], [KD], teacher=taught, pairs=PAIRS, pack_to=40)
    assert all(torch.equal(found[name], plain[name]) for name in plain)


class CountedTeacher:
    def __init__(self, teacher: LocalTeacher) -> None:
        self.teacher, self.rows = teacher, 0

    def signal(self, batch: Batch) -> Any:
        self.rows += len(batch.input_ids)
        return self.teacher.signal(batch)


def test_one_teacher_forward_for_each_row(teacher_model):
    counted = {name: CountedTeacher(LocalTeacher(teacher_model)) for name in ("a", "b")}
    router = RoutedTeacher(counted, ["a", "b", None])
    batch = collate([(s, row) for s, row in zip([0, 1, 0, 2, 0], ragged_rows(5), strict=True)])
    signal = router.signal(batch)
    assert (counted["a"].rows, counted["b"].rows) == (3, 1)
    assert [part.rows.tolist() for part in signal.parts] == [[0, 2, 4], [1]]
    for part in signal.parts:
        assert len(part.target) == int(batch.supervised[part.rows].sum())


def test_a_row_of_two_teachers_is_refused(teacher_model):
    teacher = LocalTeacher(teacher_model)
    router = RoutedTeacher({"a": teacher, "b": teacher}, ["a", "b"])
    mixed = collate([(0, ragged_rows(1)[0]), (1, ragged_rows(1)[0])], pack_to=64)
    with pytest.raises(ValueError, match="two teachers"):
        router.signal(mixed)


def test_sampled_rows_and_layers_give_the_gradient_in_the_mean(student, taught, step_gradient):
    rows = ragged_rows(8)
    attention = LossTerms(attention=Attention(weight=1.0))
    sampled = LossTerms(attention=Attention(row_fraction=0.5, layer_fraction=0.5))
    whole = step_gradient(student, [rows], [attention], teacher=taught, pairs=PAIRS)
    name = "model.layers.0.self_attn.q_proj.weight"
    draws = []
    for seed in range(24):
        draw = step_gradient(student, [rows], [sampled], teacher=taught, pairs=PAIRS, seed=seed)
        draws.append(draw[name])
    mean = torch.stack(draws).mean(0)
    one_draw = (draws[0] - whole[name]).norm() / whole[name].norm()
    assert one_draw > 0.1, "a draw is not the whole"
    assert (mean - whole[name]).norm() / whole[name].norm() < 4 * one_draw / 24**0.5
