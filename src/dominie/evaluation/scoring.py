"""Scores the questions of a task: generated answers, and likeness to a teacher or a base."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from dominie.core.task_result import FORGETTING
from dominie.data.batch import Batch, collate
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
from dominie.generation.generator import Generation, GenerationRequest, Sampling, generate_all
from dominie.generation.local import LocalGenerator
from dominie.losses.vocabulary import vocabulary_losses
from dominie.models.head import decoder, output_head, padding_for
from dominie.teachers import LocalTeacher

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
) -> list[Generation]:
    """Generate greedy answers, in the order of the questions; ranks share the questions.

    Args:
        model: in evaluation mode, or what has `outputs` of its own.
        tokenizer: of the questions, too.
        max_new_tokens: longest answer; None is the longest target and a little more.
        batch: prompts per forward pass.
    """
    longest = max(len(q.encoded.input_ids) - len(q.prompt_ids) for q in questions)
    generator = LocalGenerator(lambda: (model, tokenizer), batch=batch)
    sampling = Sampling(max_new_tokens=max_new_tokens or max(longest, 1) + _SPARE_TOKENS)
    stops = tuple(sorted({q.end_of_turn for q in questions}))
    requests = [
        GenerationRequest(token_ids=q.prompt_ids, stop_ids=stops, sampling=sampling)
        for q in questions
    ]

    def generate(members: list[int]) -> list[Generation]:
        if hasattr(model, "outputs"):
            found: list[Generation] = model.outputs([questions[i] for i in members], sampling)
            return found
        return generate_all(generator, [requests[i] for i in members])

    return compute_over_ranks([len(q.prompt_ids) for q in questions], batch, generate, track)


def score_outputs(
    questions: Sequence[Question], outputs: Sequence[Generation], task: MetricSettings
) -> ScoredTask:
    """Score outputs; one of another form than the one asked for counts as wrong.

    Thoughts are not scored, nor those of a target, unless the task keeps them. `cut` and `empty`
    are the rates of answers that a limit ended and of those without a word, if there are any.

    Raises:
        InputError: a row that no answer could be right to.
    """
    parted = [output.parted(keep_thoughts=task.keep_thoughts) for output in outputs]
    found = [
        score_answer(task, extract(task.extract, each.answer), question.conversation)
        for question, each in zip(questions, parted, strict=True)
    ]
    samples = []
    for question, output, each, score in zip(questions, outputs, parted, found, strict=True):
        target = Generation(question.target, "stop").parted(keep_thoughts=task.keep_thoughts)
        more = {
            "invalid": not score.valid,
            "cut": output.stop_reason == "length",
            "empty": not each.answer.strip() and bool(target.answer.strip()),
            "thoughts": each.thoughts,
        }
        sample = _sample(question, target.answer, each.answer, score.score)
        samples.append(sample | {name: value for name, value in more.items() if value})
    rates = {
        name: sum(name in sample for sample in samples) / len(samples)
        for name in ("invalid", "cut", "empty")
    }
    always = {"invalid"} if may_be_invalid(task) else set()
    return _scored(
        questions,
        [each.sums for each in found],
        METRICS[task.metric].statistic,
        extras={n: rate for n, rate in rates.items() if n in always or (rate and n != "invalid")},
        samples=samples,
    )


def _sample(question: Question, target: str, output: str, score: float) -> dict[str, Any]:
    return {
        "prompt": question.prompt,
        "target": target,
        "output": output,
        "correct": score >= 1.0,
        "score": score,
        "group": question.group,
    }


def _scored(
    questions: Sequence[Question],
    sums: Sequence[Sequence[float]],
    statistic: str = "ratio",
    **more: Any,
) -> ScoredTask:
    return score_items(
        sums,
        statistic,
        questions=[question.prompt for question in questions],
        groups=[question.group for question in questions],
        **more,
    )


#: Columns of the sums of a question.
_TOKENS, _AGREED, _KL, _LOSS = range(4)


def agreement(
    model: Any,
    teacher: Any,
    questions: Sequence[Question],
    *,
    batch: int = 64,
    track: Track = untracked,
) -> ScoredTask:
    """Score by how often model and teacher find the same next token most probable.

    Only supervised tokens count. `kl` is KL(teacher ‖ model) and `loss` the model's next-token
    loss, in nats per token. Tokens of one question are not independent: errors are clustered by
    question. Ranks share the questions.

    Args:
        model: in evaluation mode.
        teacher: a frozen model of the same tokens.
        batch: conversations per forward pass.
    """
    sums = _compared(model, teacher, questions, batch, track)
    means = _means(sums)
    means.pop("agreement", None)  # which is the score
    return _scored(questions, sums[:, [_AGREED, _TOKENS]].tolist(), extras=means)


def forgetting(
    model: Any,
    base: Any,
    questions: Sequence[Question],
    *,
    batch: int = 64,
    track: Track = untracked,
) -> ScoredTask:
    """Measure how far a model has moved from its base: KL(base ‖ model) on these conversations.

    It is the mean over the supervised tokens, each after the tokens of the data before it, over
    the whole vocabulary, `kl` in nats. RL's Razor (arXiv 2509.04259) finds that on the prompts
    of a new task it predicts what is forgotten of others. The score is exp(−KL), of which 1 is the
    base itself; `agreement` is how often both find the same token most probable, and `loss` the
    model's next-token loss. Tokens of one question are resampled together. Ranks share the
    questions.

    Args:
        model: in evaluation mode.
        base: a frozen model of the same tokens.
        batch: conversations per forward pass.
    """
    sums = _compared(model, base, questions, batch, track)
    kept = METRICS[FORGETTING].statistic
    return _scored(questions, sums[:, [_KL, _TOKENS]].tolist(), kept, extras=_means(sums))


#: By the names of their metrics.
LIKENESSES = {"agreement": agreement, FORGETTING: forgetting}


def _means(sums: torch.Tensor) -> dict[str, float]:
    """Return the means over all tokens of [N, 4] sums, in nats but for the agreement."""
    tokens, agreed, kl, loss = sums.sum(dim=0).tolist()
    if not tokens:
        return {}
    return {"kl": kl / tokens, "agreement": agreed / tokens, "loss": loss / tokens}


def _compared(
    model: Any, teacher: Any, questions: Sequence[Question], batch: int, track: Track
) -> torch.Tensor:
    """Return [N, 4] sums over the supervised tokens of each question, in float64."""
    frozen_teacher, padding = LocalTeacher(teacher), padding_for(model, teacher)

    def compare(members: list[int]) -> list[list[float]]:
        rows = collate([(0, questions[i].encoded) for i in members], padding=padding)
        return _compare_batch(model, frozen_teacher, rows.to(model.device))

    lengths = [len(question.encoded.input_ids) for question in questions]
    return torch.tensor(compute_over_ranks(lengths, batch, compare, track), dtype=torch.float64)


@torch.no_grad()
def _compare_batch(model: Any, teacher: LocalTeacher, batch: Batch) -> list[list[float]]:
    """Return [B, 4], supervised sums of each row: count, agreement, KL, next-token loss."""
    hidden, labels = _states_and_labels(model, batch)
    target = teacher.predictions(batch)
    losses = vocabulary_losses(hidden, output_head(model), target, labels=labels)
    found = losses.per_token
    columns = [hidden.new_ones(len(hidden)), found.agreement, found.divergence, found.next_token]
    per_token = torch.stack([column.double() for column in columns if column is not None], dim=1)
    return _summed(per_token, batch)


def _states_and_labels(model: Any, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the hidden states [N, D] of the supervised positions of a batch, and their labels."""
    states = decoder(model)(**batch.model_inputs()).last_hidden_state
    return states.flatten(0, 1)[batch.positions], batch.labels.flatten()[batch.positions]


def _summed(per_token: torch.Tensor, batch: Batch) -> list[list[float]]:
    """Sum [N, K] values of the N supervised tokens of a batch by row."""
    rows, length = batch.input_ids.shape
    sums = per_token.new_zeros((rows, per_token.shape[1]))
    sums.index_add_(0, batch.positions // length, per_token)
    found: list[list[float]] = sums.tolist()
    return found
