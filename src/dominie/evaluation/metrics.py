"""What a model is scored by, one function a metric: a model and conversations in, a `Score` out."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from dominie.data.batches import Batch, collate
from dominie.data.conversations import Conversation
from dominie.data.templates import Encoded, encode, prompt_ids
from dominie.errors import InputError
from dominie.evaluation.generation import answers
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
        figures: dict[str, Any] = {
            "score": self.score,
            "stderr": self.stderr,
            "n": self.n,
            **self.extras,
        }
        if self.groups:
            figures["groups"] = {name: group.as_dict() for name, group in self.groups.items()}
        return figures


Track = Callable[[Any, int], Any]


def exact_match(
    model: Any,
    tokenizer: Any,
    conversations: Sequence[Conversation],
    *,
    by: str | None = None,
    max_new_tokens: int | None = None,
    batch: int = 64,
    track: Track = lambda items, total: items,
) -> Score:
    """The fraction of last assistant turns given word for word, white space aside.

    Args:
        model: in evaluation mode.
        tokenizer: its tokenizer, with a chat template.
        conversations: the last assistant turn of each is the target; what precedes it is the
            prompt.
        by: field to group by.
        max_new_tokens: longest answer; None is the longest target and a little more.
        batch: prompts per forward pass.
        track: wraps the stream of answers to show progress.
    """
    asked = [_asked(conversation) for conversation in conversations]
    prompts = [
        prompt_ids(tokenizer, messages, c.tools)
        for (messages, _), c in zip(asked, conversations, strict=True)
    ]
    encoded = [encode(tokenizer, conversation) for conversation in conversations]
    longest = max(len(e.input_ids) - len(p) for e, p in zip(encoded, prompts, strict=True))
    stream = answers(
        model,
        tokenizer,
        prompts,
        end_of_turn=sorted({_last_supervised(e) for e in encoded}),
        max_new_tokens=max_new_tokens or max(longest, 1) + _ROOM,
        batch=batch,
    )
    outputs = dict(track(stream, len(prompts)))
    samples = [
        {
            "prompt": _shown(messages),
            "target": target,
            "output": outputs[i],
            "correct": outputs[i].split() == target.split(),
            "group": _group(conversations[i], by),
        }
        for i, (messages, target) in enumerate(asked)
    ]
    return _grouped_means([(float(s["correct"]), s["group"]) for s in samples], samples)


def agreement(
    model: Any,
    tokenizer: Any,
    conversations: Sequence[Conversation],
    *,
    teacher: Any,
    by: str | None = None,
    batch: int = 64,
    track: Track = lambda items, total: items,
) -> Score:
    """How often model and teacher hold the same next token most probable.

    `kl` is KL(teacher ‖ model) and `loss` the model's next-token loss, in nats per supervised
    token.
    """
    encoded = [encode(tokenizer, conversation) for conversation in conversations]
    order = sorted(range(len(encoded)), key=lambda i: len(encoded[i].input_ids))
    starts = range(0, len(order), batch)
    speaker = LocalTeacher(teacher)
    sums = torch.zeros(
        len(encoded), 4, dtype=torch.float64
    )  # tokens, agreement, divergence, next token
    for start in track(starts, len(starts)):
        members = order[start : start + batch]
        rows = collate([(0, encoded[i]) for i in members])
        moved = {
            k: v.to(model.device) if torch.is_tensor(v) else v for k, v in rows.as_dict().items()
        }
        per_row = _compared(model, speaker, Batch.from_dict(moved))
        sums[members] = per_row.cpu()
    tokens, agreed, divergence, next_token = sums.T.tolist()
    groups = {}
    if by is not None:
        named = [_group(conversation, by) for conversation in conversations]
        for group in sorted({name for name in named if name is not None}):
            chosen = [i for i, name in enumerate(named) if name == group]
            score, stderr = ratio_and_stderr(
                [agreed[i] for i in chosen], [tokens[i] for i in chosen]
            )
            groups[group] = Score(score, stderr, len(chosen))
    score, stderr = ratio_and_stderr(agreed, tokens)
    extras = {
        "kl": ratio_and_stderr(divergence, tokens)[0],
        "loss": ratio_and_stderr(next_token, tokens)[0],
    }
    return Score(score, stderr, len(encoded), groups, extras)


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


def _asked(conversation: Conversation) -> tuple[list[dict[str, Any]], str]:
    """The messages before the last assistant turn, and that turn's text."""
    last = max(i for i, m in enumerate(conversation.messages) if m["role"] == "assistant")
    if last == 0:
        raise InputError("nothing is asked before the answer", where=conversation.where)
    return conversation.messages[:last], conversation.messages[last]["content"]


def _last_supervised(encoded: Encoded) -> int:
    return max((i, token) for i, token in enumerate(encoded.input_ids) if encoded.supervised[i])[1]


def _shown(messages: Sequence[Mapping[str, Any]]) -> str:
    if len(messages) == 1:
        return str(messages[0]["content"])
    return "\n".join(f"{m['role']}: {m['content']}" for m in messages)


def _group(conversation: Conversation, by: str | None) -> str | None:
    if by is None:
        return None
    found = conversation.fields.get(by)
    return None if found is None else str(found)


def _grouped_means(
    values: Sequence[tuple[float, str | None]], samples: Sequence[Mapping[str, Any]]
) -> Score:
    names = sorted({group for _, group in values if group is not None})
    groups = {}
    for name in names:
        chosen = [value for value, group in values if group == name]
        groups[name] = Score(*mean_and_stderr(chosen), len(chosen))
    return Score(
        *mean_and_stderr([value for value, _ in values]), len(values), groups, samples=samples
    )
