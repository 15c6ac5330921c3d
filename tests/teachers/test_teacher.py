"""A teacher inside the student's model: the base, whatever the student's adapter does to it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tiny import tiny_folder

from dominie.core.errors import InputError
from dominie.data.batch import collate
from dominie.data.tokenization import Encoded
from dominie.models.loading import load_frozen, load_student
from dominie.models.spec import Model
from dominie.teachers import AdapterTeacher, LocalTeacher
from dominie.training.settings import Lora


@pytest.fixture
def spec(tmp_path):
    return Model(path=str(tiny_folder(tmp_path / "base")))


@pytest.fixture
def student(spec):
    """A student whose adapter is no longer what it began as."""
    model = load_student(spec, lora=Lora(r=2, dropout=0.5))
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.5)
    return model.train()


@pytest.fixture
def batch():
    ids = np.random.default_rng(0).integers(3, 60, 9).tolist()
    return collate([(0, Encoded(ids, [i > 3 for i in range(9)]))])


def hidden(teacher, batch) -> torch.Tensor:
    target = teacher.signal(batch).parts[0].target
    return target[0] if isinstance(target, tuple) else target.hidden


def test_the_bare_base_is_the_teacher_and_the_student_stays_as_it_was(spec, student, batch):
    teacher = AdapterTeacher(student, None)
    expected = hidden(LocalTeacher(load_frozen(spec)), batch)
    torch.testing.assert_close(hidden(teacher, batch), expected)
    assert student.training
    with torch.no_grad():
        learnt = student.eval()(input_ids=batch.input_ids).logits
        with teacher.activated() as model:
            assert not model.training
            taught = model(input_ids=batch.input_ids).logits
    assert float((learnt - taught).abs().max()) > 0.1


def test_captured_layers_can_be_changed(student, batch):
    teacher = AdapterTeacher(student, None, attention_layers=[0])
    assert set(teacher.signal(batch).parts[0].attention) == {0}
    teacher.capture([0, 1])
    assert set(teacher.signal(batch).parts[0].attention) == {0, 1}
    teacher.capture([])
    assert not teacher.signal(batch).parts[0].attention


def test_the_wrapper_of_the_release_before_is_the_same_teacher(student, batch):
    first = AdapterTeacher(student, None)
    again = AdapterTeacher(first, attention_layers=[1])
    torch.testing.assert_close(hidden(again, batch), hidden(first, batch))
    assert set(again.signal(batch).parts[0].attention) == {1}


def test_an_adapter_that_is_not_there_is_named(student, tmp_path):
    with pytest.raises(InputError, match="cannot be laid over") as refused:
        AdapterTeacher(student, str(tmp_path))
    assert refused.value.where == str(tmp_path)
