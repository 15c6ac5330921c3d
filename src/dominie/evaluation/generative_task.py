"""Tasks with a generated answer: generate, extract, score, sum up."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from dominie.evaluation.extraction import extracted
from dominie.evaluation.metrics import grader, may_be_invalid, statistic_of
from dominie.evaluation.results import Score, scored
from dominie.evaluation.task import Question, Scoring
from dominie.generation.generator import answers

#: Wraps a stream of so many items to show progress.
Track = Callable[[Any, int], Any]


def untracked(items: Any, _: int) -> Any:
    """The items, and nothing shown."""
    return items


#: New tokens allowed beyond the longest target of a split.
_ROOM = 8


def answered(
    model: Any,
    tokenizer: Any,
    questions: Sequence[Question],
    scoring: Scoring,
    *,
    max_new_tokens: int | None = None,
    batch: int = 64,
    track: Track = untracked,
) -> Score:
    """The score of greedy answers: `outputs_of` questions, then `graded`."""
    outputs = outputs_of(
        model, tokenizer, questions, max_new_tokens=max_new_tokens, batch=batch, track=track
    )
    return graded(questions, outputs, scoring)


def outputs_of(
    model: Any,
    tokenizer: Any,
    questions: Sequence[Question],
    *,
    max_new_tokens: int | None = None,
    batch: int = 64,
    track: Track = untracked,
) -> list[str]:
    """Greedy answers in the order of the questions.

    Args:
        model: in evaluation mode.
        tokenizer: its tokenizer.
        questions: in that tokenizer's ids.
        max_new_tokens: longest answer; None is the longest target and a little more.
        batch: prompts per forward pass.
        track: shows progress.
    """
    longest = max(len(q.encoded.input_ids) - len(q.prompt_ids) for q in questions)
    stream = answers(
        model,
        tokenizer,
        [q.prompt_ids for q in questions],
        end_of_turn=sorted({q.end_of_turn for q in questions}),
        max_new_tokens=max_new_tokens or max(longest, 1) + _ROOM,
        batch=batch,
    )
    outputs = dict(track(stream, len(questions)))
    return [outputs[i] for i in range(len(questions))]


def graded(questions: Sequence[Question], outputs: Sequence[str], scoring: Scoring) -> Score:
    """The score of outputs; one of another form than was asked for counts as wrong.

    Raises:
        InputError: a row that no answer could be right to.
    """
    grade = grader(scoring)
    found = [extracted(scoring.extract, output) for output in outputs]
    grades = [grade(answer, q.conversation) for answer, q in zip(found, questions, strict=True)]
    samples = [
        {
            "prompt": question.prompt,
            "target": question.target,
            "output": output,
            "correct": each.score >= 1.0,
            "score": each.score,
            "group": question.group,
            **({} if each.valid else {"invalid": True}),
        }
        for question, output, each in zip(questions, outputs, grades, strict=True)
    ]
    invalid = sum(not each.valid for each in grades) / len(grades)
    return scored(
        [each.sums for each in grades],
        statistic_of(scoring),
        questions=[question.prompt for question in questions],
        groups=[question.group for question in questions],
        extras={"invalid": invalid} if may_be_invalid(scoring) else {},
        samples=samples,
    )
