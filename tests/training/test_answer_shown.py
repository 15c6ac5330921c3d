"""Teachers that read the right answer: their loss is the naive one, wherever the tokens stand."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

from dominie.core.errors import InputError
from dominie.data.batch import filled
from dominie.data.row_store import Row
from dominie.losses.terms import LossTerms, Prediction
from dominie.teachers import LocalTeacher, RoutedTeacher
from dominie.teachers.answer_shown import AnswerPrompt, AnswerReadingTeacher
from dominie.toyworld.toy_models import word_tokenizer

END, HEADER, BEFORE, AFTER = 60, 59, (55, 56), (57,)  # beside the tokens of the conversations
PLAIN = "{% for m in messages %}{{ m.content + ' plus ' }}{% endfor %}"  # no token ends a question
PROMPT = AnswerPrompt((END,), BEFORE, AFTER, frozenset({END, HEADER}))


class Answered(NamedTuple):
    """A conversation that the student has answered."""

    input_ids: list[int]
    supervised: list[bool]
    shown: list[int]


class Told(NamedTuple):
    """A conversation, and by hand what its teacher reads: tokens, and which are predicted."""

    row: Any
    read: list[int]
    scored: list[int]


def conversations(count: int, seed: int) -> list[Told]:
    """Of one to three turns; every other one with an answer that is not the right one."""
    rng = np.random.default_rng(seed)

    def words(most: int) -> list[int]:
        return rng.integers(0, 50, int(rng.integers(1, most))).tolist()

    found = []
    for number in range(count):
        ids, flags, read, scored = [54], [False], [54], []
        last = int(rng.integers(1, 4))
        for turn in range(last):
            question, answer, own = words(5), words(4), words(6)
            is_own = number % 2 == 1 and turn == last - 1
            written = [*own] if is_own else [*answer, END]
            counts = turn == last - 1 or number % 2 == 0
            ids += [*question, END, HEADER, *written]
            flags += [False] * (len(question) + 2) + [counts] * len(written)
            read += [*question, *((*BEFORE, *answer, *AFTER) if counts else ()), END, HEADER]
            scored += range(len(read), len(read) + len(written)) if counts else ()
            read += written
        row = Answered(ids, flags, [*answer, END]) if number % 2 else Row(ids, flags)
        found.append(Told(row, read, scored))
    return found


def naive(student: Any, teacher: Any, sources: Sequence[Sequence[Told]], kind: str) -> torch.Tensor:
    """The mean divergence over the predicted tokens; the last source's teacher reads no answers."""
    total, count = torch.zeros((), dtype=torch.float64), 0
    for number, told in enumerate(sources):
        for row, read, scored in told:
            own = torch.tensor([i for i, flag in enumerate(row.supervised) if flag])
            if number == len(sources) - 1:
                read, scored = row.input_ids, own.tolist()
            s = student(input_ids=torch.tensor([row.input_ids])).logits[0, own - 1].log_softmax(-1)
            with torch.no_grad():
                logits = teacher(input_ids=torch.tensor([read])).logits[0]
            t = logits[torch.tensor(scored) - 1].log_softmax(-1)
            one, other = (t, s) if kind == "forward_kl" else (s, t)
            total = total + (one.exp() * (one - other)).sum()
            count += len(own)
    return total / count


@pytest.mark.parametrize(
    ("kind", "pack_to", "micro_batch", "ahead"),
    [("forward_kl", None, 12, 1), ("forward_kl", 40, 4, 3), ("reverse_kl", 40, 12, 1)],
)
def test_gradients_are_those_of_the_naive_loss(
    student, teacher_model, step_gradient, kind, pack_to, micro_batch, ahead
):
    sources = [conversations(7, seed=3), conversations(5, seed=4)]
    naive(student, teacher_model, sources, kind).backward()
    expected = {name: p.grad.clone() for name, p in student.named_parameters()}
    student.zero_grad()
    plain = LocalTeacher(teacher_model)
    reading = AnswerReadingTeacher(plain, PROMPT)
    found = step_gradient(
        student,
        [[told.row for told in source] for source in sources],
        [LossTerms(prediction=Prediction(kind=kind))] * 2,
        teacher=RoutedTeacher({"reading": reading, "plain": plain}, ["reading", "plain"]),
        routes=[0, 1],
        pack_to=pack_to,
        micro_batch=micro_batch,
        micro_batches_ahead=ahead,
    )
    for name, each in expected.items():
        torch.testing.assert_close(found[name], each, rtol=1e-5, atol=1e-9)


def test_a_teacher_that_reads_answers_and_compares_attention_elsewhere_shows_none(teacher_model):
    teacher = LocalTeacher(teacher_model, attention_layers=[0])
    batch = filled([[(0, told.row)] for told in conversations(3, seed=1)])
    (plain,), (reading,) = (
        each.signal(batch).parts for each in (teacher, AnswerReadingTeacher(teacher, PROMPT))
    )
    assert plain.attention
    assert not reading.attention
    assert len(plain.target) == len(reading.target)
    assert not torch.allclose(plain.target.hidden, reading.target.hidden)


@pytest.mark.parametrize(
    ("template", "read"),
    [
        (None, "how many ? first 4 final <|end|>"),
        (
            "{% for m in messages %}{{ m.content + ' plus ' }}{% endfor %}",
            "how many ? first 4 final plus",
        ),
    ],
    ids=["token_of_its_own", "words"],
)
def test_answers_stand_at_the_end_of_the_question(template, read):
    tokenizer = word_tokenizer()
    if template:
        tokenizer.chat_template = template
    prompt = AnswerPrompt.of(tokenizer, "first {answer} final")
    ids = tokenizer("how many ? plus" if template else "how many ? <|end|>")["input_ids"]
    four = tokenizer("4")["input_ids"]
    row = Row([*ids, *four, tokenizer.eos_token_id], [False] * len(ids) + [True, True])
    made = prompt.row(filled([[(0, row)]]).spans[0])
    assert tokenizer.decode(made.input_ids[: -len(row.input_ids) + len(ids)]) == read
    assert made.input_ids[-2:].tolist() == row.input_ids[-2:]
    assert made.supervised.tolist() == [False] * (len(ids) + 3) + [True, True]


def test_a_conversation_without_a_question_is_refused():
    span = filled([[(0, Row([1, 2, 3], [False, False, True]))]]).spans[0]
    with pytest.raises(ValueError, match="no question ends before the answer"):
        PROMPT.row(span)
    tokenizer = word_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    with pytest.raises(InputError, match="nothing between a question and its answer"):
        AnswerPrompt.of(tokenizer, "{answer}")
