"""A teacher that reads several micro-batches at once teaches what it teaches one by one."""

from __future__ import annotations

import pytest
import torch
from gradients import assert_equal_gradients, ragged_rows

from dominie.core.errors import InputError
from dominie.data.batch import collate, joined
from dominie.losses.terms import Attention, LossTerms, NextToken, Prediction
from dominie.teachers import LocalTeacher, RoutedTeacher
from dominie.teachers.ahead import signals
from dominie.training.settings import TrainSettings

PAIRS = [(0, 0), (1, 1)]
TERMS = [
    LossTerms(prediction=Prediction(), attention=Attention()),
    LossTerms(prediction=Prediction(kind="jsd")),
    LossTerms(next_token=NextToken()),
]


def routed(model) -> RoutedTeacher:
    """One teacher with attention, one without; a source with neither."""
    teachers = {"maps": LocalTeacher(model, attention_layers=[0, 1]), "plain": LocalTeacher(model)}
    return RoutedTeacher(teachers, ["maps", "plain", None])


@pytest.mark.parametrize("pack_to", [None, 24])
def test_the_gradient_is_the_same_and_the_forwards_are_fewer(
    student, teacher_model, step_gradient, pack_to
):
    rows = [ragged_rows(5, 1), ragged_rows(4, 2), ragged_rows(3, 3)]
    forwards: list[int] = []
    teacher_model.model.register_forward_hook(lambda *_: forwards.append(1))
    found, counts = [], []
    for ahead in (1, 2, 4, 6):  # of six micro-batches: 4 leaves two for the last forward
        forwards.clear()
        found.append(
            step_gradient(
                student,
                rows,
                TERMS,
                teacher=routed(teacher_model),
                routes=[0, 1, 2],
                micro_batch=2,
                pairs=PAIRS,
                pack_to=pack_to,
                micro_batches_ahead=ahead,
            )
        )
        counts.append(len(forwards))
    for other in found[1:]:
        assert_equal_gradients(found[0], other)
    assert counts == sorted(counts, reverse=True)
    assert counts[0] > counts[-1] == 2, "one for each teacher"


def test_norms_by_source_are_still_measured(student, teacher_model, step_gradient):
    rows = [ragged_rows(4, 1), ragged_rows(4, 2)]
    one, ahead = (
        step_gradient(
            student,
            rows,
            TERMS[:2],
            teacher=routed(teacher_model),
            routes=[0, 1],
            micro_batch=2,
            pairs=PAIRS,
            source_gradients=True,
            micro_batches_ahead=n,
        )
        for n in (1, 4)
    )
    assert_equal_gradients(one, ahead)


def test_padding_added_to_join_batches_is_seen_by_nobody(teacher_model):
    batches = [
        collate([(0, row) for row in ragged_rows(count, seed)], pack_to=pack_to)
        for count, seed, pack_to in ((3, 4, 20), (2, 5, 40), (1, 6, 15))
    ]
    whole = joined(batches)
    assert len({batch.input_ids.shape[1] for batch in batches}) == 3
    assert whole.supervised.sum() == sum(batch.supervised.sum() for batch in batches)
    apart = whole.source_ids.split([len(batch.labels) for batch in batches])
    for batch, rows in zip(batches, apart, strict=True):
        assert (rows[:, batch.labels.shape[1] :] == -1).all()
    teacher = LocalTeacher(teacher_model, attention_layers=[1])
    for batch, said in zip(batches, signals(teacher, batches), strict=True):
        (expected,), (part,) = teacher.signal(batch).parts, said.parts
        torch.testing.assert_close(part.target.hidden, expected.target.hidden)
        real = batch.source_ids >= 0  # in a packed batch padding has positions of its own
        found, wanted = (each.attention[1].query.transpose(1, 2) for each in (part, expected))
        torch.testing.assert_close(found[real], wanted[real])


def test_a_teacher_reads_whole_micro_batches():
    assert TrainSettings(batch=8, micro_batch=2).micro_batches_ahead(1) == 1
    settings = TrainSettings(batch=8, micro_batch=2, teacher_micro_batch=6)
    assert settings.micro_batches_ahead(1) == 3
    with pytest.raises(InputError, match=r"a multiple of the 2 of micro_batch"):
        TrainSettings(batch=8, micro_batch=2, teacher_micro_batch=3).micro_batches_ahead(1)
