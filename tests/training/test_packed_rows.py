"""A step over packed rows, attended conversation by conversation, is the step over padded ones."""

from __future__ import annotations

import pytest
import torch
from gradients import ragged_rows

from dominie.losses.terms import Attention, LossTerms, NextToken, Prediction
from dominie.models import packed_attention
from dominie.teachers import LocalTeacher

TERMS = LossTerms(
    next_token=NextToken(weight=0.3), prediction=Prediction(), attention=Attention(weight=0.7)
)


@pytest.mark.parametrize(
    ("windows", "gradient_checkpointing"), [((None, None), True), ((5, 3), False)]
)
def test_gradients_of_packed_rows_are_those_of_padded_ones(
    student, teacher_model, step_gradient, windows, gradient_checkpointing, monkeypatch
):
    student.config.sliding_window, teacher_model.config.sliding_window = windows
    rows, pairs = [ragged_rows(8)], [(0, 0), (1, 1)]
    attended = {student: 0, teacher_model: 0}
    by_conversation = packed_attention._within

    def counted(stock, module, *given):
        model = next(model for model in attended if module in {*model.modules()})
        attended[model] += 1
        return by_conversation(stock, module, *given)

    monkeypatch.setattr(packed_attention, "_within", counted)

    def gradient(pack_to, micro_batch):
        teacher = LocalTeacher(teacher_model, attention_layers=[0, 1])
        found = step_gradient(
            student,
            rows,
            [TERMS],
            teacher=teacher,
            pack_to=pack_to,
            micro_batch=micro_batch,
            pairs=pairs,
            gradient_checkpointing=gradient_checkpointing,
        )
        teacher.capture([])
        return found

    expected = gradient(None, 8)
    assert not any(attended.values())
    for micro_batch in (8, 4):
        found = gradient(40, micro_batch)
        for name, each in expected.items():
            torch.testing.assert_close(
                found[name], each, rtol=1e-5, atol=1e-6 * float(each.abs().max())
            )
        assert student.config._attn_implementation == "sdpa", "as it was"
    assert attended[student] > 0
    assert attended[teacher_model] > 0
