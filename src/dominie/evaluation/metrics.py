"""What a model is scored by, one function a metric: a model and questions in, a `Score` out."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from dominie.data.batches import Batch, collate
from dominie.evaluation.generation import answers
from dominie.evaluation.questions import Question
from dominie.evaluation.statistics import mean_and_stderr, ratio_and_stderr
from dominie.losses.vocabulary import vocabulary_losses
from dominie.models.head import decoder, output_head
from dominie.teachers import LocalTeacher

#: New tokens allowed beyond the longest target of a split.
_ROOM = 8


@dataclass(frozen=True)
class Score:
    """How a model did on a task.

    Attributes:
        score: from 0 to 1.
        stderr: its standard error.
        n: conversations it was measured on.
        groups: the same by group of conversations.
        extras: further figures, `kl` and `loss` in nats per token.
        samples: one for each conversation: prompt, target, output, correct, group.
    """

    score: float
    stderr: float
    n: int
    groups: Mapping[str, Score] = field(default_factory=dict)
    extras: Mapping[str, float] = field(default_factory=dict)
    samples: Sequence[Mapping[str, Any]] = ()

    def as_dict(self) -> dict[str, Any]:
        """The figures as `results.json` holds them."""
        figures: dict[str, Any] = {"score": self.score, "stderr": self.stderr, "n": self.n}
        figures |= self.extras
        if self.groups:
            figures["groups"] = {name: group.as_dict() for name, group in self.groups.items()}
        return figures


#: Wraps a stream of so many items to show progress.
Track = Callable[[Any, int], Any]


def _untracked(items: Any, _: int) -> Any:
    return items


def exact_match(
    model: Any,
    tokenizer: Any,
    questions: Sequence[Question],
    *,
    max_new_tokens: int | None = None,
    batch: int = 64,
    track: Track = _untracked,
) -> Score:
    """The fraction of questions answered word for word, white space aside, by greedy decoding.

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
    samples = [
        {
            "prompt": question.prompt,
            "target": question.target,
            "output": outputs[i],
            "correct": outputs[i].split() == question.target.split(),
            "group": question.group,
        }
        for i, question in enumerate(questions)
    ]
    right = [float(sample["correct"]) for sample in samples]
    groups = {
        name: Score(*mean_and_stderr([right[i] for i in members]), len(members))
        for name, members in _members(questions).items()
    }
    return Score(*mean_and_stderr(right), len(right), groups, samples=samples)


def agreement(
    model: Any,
    teacher: Any,
    questions: Sequence[Question],
    *,
    batch: int = 64,
    track: Track = _untracked,
) -> Score:
    """How often model and teacher hold the same next token most probable, where supervised.

    `kl` is KL(teacher ‖ model) and `loss` the model's next-token loss, in nats per supervised
    token. Standard errors are clustered by conversation.

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
    tokens, agreed, divergence, next_token = sums.T.tolist()
    groups = {
        name: Score(
            *ratio_and_stderr([agreed[i] for i in members], [tokens[i] for i in members]),
            len(members),
        )
        for name, members in _members(questions).items()
    }
    extras = {
        "kl": ratio_and_stderr(divergence, tokens)[0],
        "loss": ratio_and_stderr(next_token, tokens)[0],
    }
    return Score(*ratio_and_stderr(agreed, tokens), len(questions), groups, extras)


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


def _members(questions: Sequence[Question]) -> dict[str, list[int]]:
    """Indices of the questions of each group, by name."""
    names = sorted({question.group for question in questions if question.group is not None})
    return {name: [i for i, q in enumerate(questions) if q.group == name] for name in names}
