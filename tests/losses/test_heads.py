"""Heads: what is refused, and rows in another order."""

from __future__ import annotations

import math

import pytest
import torch

from dominie.losses import Head, prediction_divergence


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"weight": torch.zeros(0)}, "gathered first"),
        ({"weight": torch.zeros(3, 2), "bias": torch.zeros(2)}, r"bias is \[V\] = \[3\]"),
        ({"weight": torch.zeros(3, 2), "scale": math.inf}, "scale is a finite number"),
        ({"weight": torch.zeros(3, 2), "softcap": 0.0}, "softcap is a positive number"),
    ],
)
def test_what_makes_no_head_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        Head(**arguments)


def test_a_teacher_with_other_ids_is_mapped_to_the_students():
    hidden, weight = torch.randn(4, 3), torch.randn(5, 3)
    shuffled = torch.tensor([3, 0, 4, 1, 2])
    teacher = Head(weight[shuffled], torch.arange(5.0)[shuffled])
    ids = shuffled.argsort()  # the student's token i is the teacher's token ids[i]
    student = Head(weight, torch.arange(5.0))
    assert prediction_divergence(hidden, student, hidden, teacher) > 0.1
    assert prediction_divergence(hidden, student, hidden, teacher.reordered(ids)).abs() < 1e-5


@pytest.mark.parametrize("ids", [[0, 0], [0, 5], [-1, 2], [], [[0]], [0.5]])
def test_a_map_of_ids_is_checked(ids):
    with pytest.raises(ValueError, match="ids are"):
        Head(torch.zeros(5, 2)).reordered(torch.tensor(ids))
