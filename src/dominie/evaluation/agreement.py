"""How often a model and a teacher hold the same next token most probable."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from dominie.data.batches import Batch, collate
from dominie.evaluation.grades import Score, scored
from dominie.evaluation.questions import Question
from dominie.evaluation.tracking import Track, untracked
from dominie.losses.vocabulary import vocabulary_losses
from dominie.models.head import decoder, output_head
from dominie.teachers import LocalTeacher


def agreement(
    model: Any,
    teacher: Any,
    questions: Sequence[Question],
    *,
    batch: int = 64,
    track: Track = untracked,
) -> Score:
    """How often model and teacher hold the same next token most probable, where supervised.

    `kl` is KL(teacher ‖ model) and `loss` the model's next-token loss, in nats per supervised
    token. Tokens of one question are no independent facts: errors are clustered by question.

    Args:
        model: in evaluation mode.
        teacher: a frozen model of the same tokens.
        questions: in their tokenizer's ids.
        batch: conversations per forward pass.
        track: shows progress.
    """
    order = sorted(range(len(questions)), key=lambda i: len(questions[i].encoded.input_ids))
    starts = range(0, len(order), batch)
    speaker = LocalTeacher(teacher)
    sums = torch.zeros(len(questions), 4, dtype=torch.float64)
    for start in track(starts, len(starts)):
        members = order[start : start + batch]
        rows = collate([(0, questions[i].encoded) for i in members])
        sums[members] = _compared(model, speaker, rows.to(model.device)).cpu()
    tokens, _, divergence, next_token = sums.sum(dim=0).tolist()
    return scored(
        sums[:, [1, 0]].tolist(),
        "ratio",
        questions=[question.prompt for question in questions],
        groups=[question.group for question in questions],
        extras={"kl": divergence / tokens, "loss": next_token / tokens} if tokens else {},
    )


@torch.no_grad()
def _compared(model: Any, teacher: LocalTeacher, batch: Batch) -> torch.Tensor:
    """[B, 4] supervised sums of each row: count, agreement, KL, next-token loss."""
    supervised = batch.supervised
    hidden = decoder(model)(**batch.model_inputs()).last_hidden_state[supervised]
    target = teacher.signal(batch).parts[0].target
    losses = vocabulary_losses(hidden, output_head(model), target, labels=batch.labels[supervised])
    found = losses.per_token
    columns = [hidden.new_ones(len(hidden)), found.agreement, found.divergence, found.next_token]
    per_token = torch.stack([column.double() for column in columns if column is not None], dim=1)
    row = supervised.nonzero()[:, 0]
    return per_token.new_zeros((len(batch.labels), 4)).index_add_(0, row, per_token)
