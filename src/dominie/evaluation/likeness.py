"""How like another model a model is: how often they agree, how far it has moved from its base."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from dominie.core.task_result import FORGETTING
from dominie.data.batch import Batch, collate
from dominie.evaluation.metrics import METRICS
from dominie.evaluation.score_items import ScoredTask
from dominie.evaluation.scoring import scored, summed_by_row
from dominie.evaluation.task import Question, Track, compute_over_ranks, untracked
from dominie.losses.vocabulary import vocabulary_losses
from dominie.models.head import decoder, output_head
from dominie.teachers import LocalTeacher

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
    return scored(questions, sums[:, [_AGREED, _TOKENS]].tolist(), extras=means)


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
    return scored(questions, sums[:, [_KL, _TOKENS]].tolist(), kept, extras=_means(sums))


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
    frozen_teacher = LocalTeacher(teacher)

    def compare(members: list[int]) -> list[list[float]]:
        rows = collate([(0, questions[i].encoded) for i in members]).to(model.device)
        return _compare_batch(model, frozen_teacher, rows)

    lengths = [len(question.encoded.input_ids) for question in questions]
    return torch.tensor(compute_over_ranks(lengths, batch, compare, track), dtype=torch.float64)


@torch.no_grad()
def _compare_batch(model: Any, teacher: LocalTeacher, batch: Batch) -> list[list[float]]:
    """Return [B, 4], supervised sums of each row: count, agreement, KL, next-token loss."""
    supervised = batch.supervised
    hidden = decoder(model)(**batch.model_inputs()).last_hidden_state[supervised]
    target = teacher.signal(batch).parts[0].target
    losses = vocabulary_losses(hidden, output_head(model), target, labels=batch.labels[supervised])
    found = losses.per_token
    columns = [hidden.new_ones(len(hidden)), found.agreement, found.divergence, found.next_token]
    per_token = torch.stack([column.double() for column in columns if column is not None], dim=1)
    return summed_by_row(per_token, supervised)
