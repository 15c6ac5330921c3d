"""Teachers: models, adapters of the student, rows sent to the teacher of their source."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from tiny import tiny_folder, tiny_model

from dominie.core.errors import InputError
from dominie.data.batch import Batch, collate
from dominie.data.tokenization import Encoded
from dominie.losses.forward_pass import ForwardPass
from dominie.losses.objective import Objective
from dominie.losses.terms import LossTerms, NextToken, Prediction
from dominie.models.head import decoder, output_head
from dominie.models.loading import load_frozen, load_student
from dominie.models.spec import Model
from dominie.teachers import AdapterTeacher, LocalTeacher, RoutedTeacher
from dominie.training.settings import Lora


class Counted(LocalTeacher):
    """Remembers the rows of its forward passes."""

    def __init__(self, model: Any, **options: Any) -> None:
        super().__init__(model, **options)
        self.seen: list[Batch] = []

    def signal(self, batch: Batch) -> Any:
        self.seen.append(batch)
        return super().signal(batch)


def model_of(seed: int) -> Any:
    model = tiny_model("mistral", seed=seed, vocab_size=31, dtype=torch.float64)
    return model.eval().requires_grad_(False)


@pytest.fixture
def rows() -> list[tuple[int, Encoded]]:
    """Ragged conversations of the sources 0, 1 and 2, mingled."""
    generator = torch.Generator().manual_seed(0)
    lengths = [5, 9, 3, 7, 6, 8]
    return [
        (
            index % 3,
            Encoded(
                torch.randint(1, 31, (length,), generator=generator).tolist(),
                [position >= 2 for position in range(length)],
            ),
        )
        for index, length in enumerate(lengths)
    ]


def test_a_local_teacher_says_what_its_model_computes(rows):
    model = model_of(1)
    batch = collate(rows)
    (part,) = LocalTeacher(model, attention_layers=[1]).signal(batch).parts
    hidden, head = part.target.hidden, part.target.head
    assert part.rows.tolist() == list(range(6))
    start = 0
    for number, (_, row) in enumerate(rows):
        alone = decoder(model)(input_ids=torch.tensor([row.input_ids])).last_hidden_state[0]
        count = int(batch.supervised[number].sum())
        positions = batch.supervised[number].nonzero()[:, 0]
        torch.testing.assert_close(hidden[start : start + count], alone[positions])
        start += count
    assert start == len(hidden)
    assert head.weight is output_head(model).weight
    assert list(part.attention) == [1]
    assert part.attention[1].query.shape == (6, 2, 9, 8)
    assert not hidden.requires_grad


@pytest.mark.parametrize("pack_to", [None, 24])
def test_each_row_goes_to_the_teacher_of_its_source_and_to_no_other(rows, pack_to):
    one, other = Counted(model_of(1)), Counted(model_of(2))
    routed = RoutedTeacher({"one": one, "other": other}, ["one", None, "other"])
    batch = collate(rows, routes=[0, 1, 2], pack_to=pack_to)
    signal = routed.signal(batch)
    assert len(one.seen) == len(other.seen) == 1
    sent = [part.rows.tolist() for part in signal.parts]
    for rows_of_part, source in zip(sent, (0, 2), strict=True):
        expected = [
            i for i, r in enumerate(batch.source_ids) if set(r[r >= 0].tolist()) == {source}
        ]
        assert rows_of_part == expected
    assert len(one.seen[0].input_ids) + len(other.seen[0].input_ids) < len(batch.input_ids)


def test_routing_gives_each_source_the_loss_of_its_own_teacher_alone(rows):
    student, teachers = model_of(3), {"one": model_of(1), "other": model_of(2)}
    terms = [LossTerms(prediction=Prediction()), LossTerms(next_token=NextToken())]
    terms.append(LossTerms(prediction=Prediction()))
    objective = Objective(terms)
    routed = RoutedTeacher(
        {name: LocalTeacher(model) for name, model in teachers.items()}, ["one", None, "other"]
    )

    def loss(teacher: Any, chosen: list[tuple[int, Encoded]]) -> torch.Tensor:
        batch = collate(chosen)
        forward = ForwardPass(
            decoder(student)(**batch.model_inputs()).last_hidden_state,
            output_head(student),
            labels=batch.labels,
            source_ids=batch.source_ids,
            signal=teacher.signal(batch) if teacher else None,
        )
        return objective(forward).total

    together = loss(routed, rows)
    apart = sum(
        loss(LocalTeacher(teachers[name]) if name else None, [r for r in rows if r[0] == source])
        for source, name in enumerate(("one", None, "other"))
    )
    torch.testing.assert_close(together, apart)


def test_a_source_without_a_teacher_is_spoken_about_by_nobody(rows):
    routed = RoutedTeacher({"one": LocalTeacher(model_of(1))}, [None, None, None])
    assert routed.signal(collate(rows)).parts == ()


def test_a_row_of_two_teachers_is_refused(rows):
    routed = RoutedTeacher({"one": LocalTeacher(model_of(1))}, ["one", None, None])
    mixed = collate(rows, pack_to=64)  # packed without routes
    with pytest.raises(ValueError, match="two teachers"):
        routed.signal(mixed)


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
    with pytest.raises(InputError, match="cannot be applied to") as refused:
        AdapterTeacher(student, str(tmp_path))
    assert refused.value.where == str(tmp_path)
