"""Tasks with a generated answer: generate, extract, score, summarise."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from dominie.evaluation.answer_text import extract
from dominie.evaluation.metrics import METRICS, may_be_invalid, score_answer
from dominie.evaluation.score_items import ScoredTask, score_items
from dominie.evaluation.task import (
    MetricSettings,
    Question,
    Track,
    compute_over_ranks,
    untracked,
)
from dominie.generation.generator import GenerationRequest, Sampling, generate_all
from dominie.generation.local import LocalGenerator

#: New tokens allowed beyond the longest target of a split.
_SPARE_TOKENS = 8


def generate_outputs(
    model: Any,
    tokenizer: Any,
    questions: Sequence[Question],
    *,
    max_new_tokens: int | None = None,
    batch: int = 64,
    track: Track = untracked,
) -> list[str]:
    """Generate greedy answers, in the order of the questions; ranks share the questions.

    Args:
        model: in evaluation mode.
        tokenizer: its tokenizer.
        questions: in that tokenizer's ids.
        max_new_tokens: longest answer; None is the longest target and a little more.
        batch: prompts per forward pass.
        track: shows progress.
    """
    longest = max(len(q.encoded.input_ids) - len(q.prompt_ids) for q in questions)
    generator = LocalGenerator(lambda: (model, tokenizer), batch=batch)
    sampling = Sampling(max_new_tokens=max_new_tokens or max(longest, 1) + _SPARE_TOKENS)
    stops = tuple(sorted({q.end_of_turn for q in questions}))
    requests = [
        GenerationRequest(token_ids=q.prompt_ids, stop_ids=stops, sampling=sampling)
        for q in questions
    ]

    def generate(members: list[int]) -> list[str]:
        return [result.text for result in generate_all(generator, [requests[i] for i in members])]

    return compute_over_ranks([len(q.prompt_ids) for q in questions], batch, generate, track)


def score_outputs(
    questions: Sequence[Question], outputs: Sequence[str], task: MetricSettings
) -> ScoredTask:
    """Score outputs; one of another form than the one asked for counts as wrong.

    Raises:
        InputError: a row that no answer could be right to.
    """
    found = [
        score_answer(task, extract(task.extract, output), question.conversation)
        for question, output in zip(questions, outputs, strict=True)
    ]
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
        for question, output, each in zip(questions, outputs, found, strict=True)
    ]
    invalid = sum(not each.valid for each in found) / len(found)
    return score_items(
        [each.sums for each in found],
        METRICS[task.metric].statistic,
        questions=[question.prompt for question in questions],
        groups=[question.group for question in questions],
        extras={"invalid": invalid} if may_be_invalid(task) else {},
        samples=samples,
    )
