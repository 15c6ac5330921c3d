"""Scores options by their likelihood as answers; what they follow on is computed once for all."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import partial
from typing import Any, Literal

import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from dominie.data.batch import collate
from dominie.data.tokenization import Encoded, encode_all
from dominie.evaluation.score_items import ScoredTask, score_items
from dominie.evaluation.task import Question, Track, candidates, compute_over_ranks, untracked
from dominie.losses.vocabulary import vocabulary_losses
from dominie.models.head import decoder, output_head, padding_for


def choice(
    model: Any,
    tokenizer: Any,
    questions: Sequence[Question],
    *,
    options: str = "options",
    likelihood: Literal["sum", "tokens", "bytes"] = "sum",
    batch: int = 64,
    track: Track = untracked,
) -> ScoredTask:
    """Score by the fraction of questions whose right option is the most probable answer.

    An option's log-likelihood is that of the whole answer with the token that ends the turn, so
    that no option wins for being the beginning of another. Ranks share the questions.

    Args:
        model: in evaluation mode, or what has `log_likelihoods` of its own.
        tokenizer: of the questions, too.
        options: the field that lists the options.
        likelihood: the sum over an option's tokens, or that divided by tokens or by bytes.
        batch: options per forward pass; those of one question are never parted.

    Raises:
        InputError: a row without options, or whose target is none of them.
    """
    offered = [candidates(question.conversation, options) for question in questions]
    rows = _encoded(tokenizer, questions, [texts for texts, _ in offered])

    of_model = getattr(model, "log_likelihoods", None) or partial(_log_likelihoods, model)

    def log_likelihoods(members: list[int]) -> list[list[list[float]]]:
        found: list[list[list[float]]] = of_model([rows[i] for i in members])
        return found

    lengths = [max(len(row.input_ids) for row in each) for each in rows]
    together = max(1, batch // max(map(len, rows), default=1))
    totals = compute_over_ranks(lengths, together, log_likelihoods, track)
    samples: list[dict[str, Any]] = []
    for question, (texts, right), found in zip(questions, offered, totals, strict=True):
        values = []
        for text, (total, tokens) in zip(texts, found, strict=True):
            units = {"sum": 1, "tokens": tokens, "bytes": len(text.encode())}
            values.append(total / max(1, units[likelihood]))
        chosen = max(range(len(values)), key=values.__getitem__)
        sample = {
            "prompt": question.prompt,
            "target": texts[right],
            "output": texts[chosen],
            "correct": chosen == right,
            "score": float(chosen == right),
            "group": question.group,
            "log_likelihoods": [round(value, 4) for value in values],
        }
        samples.append(sample)
    return score_items(
        [(float(sample["correct"]), 1.0) for sample in samples],
        "ratio",
        questions=[question.prompt for question in questions],
        groups=[question.group for question in questions],
        samples=samples,
    )


def _encoded(
    tokenizer: Any, questions: Sequence[Question], offered: Sequence[Sequence[str]]
) -> list[list[Encoded]]:
    """Encode each question with each option for an answer; only that answer is supervised."""
    conversations, begins = [], []
    for question, texts in zip(questions, offered, strict=True):
        for text in texts:
            messages = [*question.asked, {"role": "assistant", "content": text}]
            chat = dataclasses.replace(question.conversation, messages=messages, weights=())
            conversations.append(chat)
            begins.append(len(question.prompt_ids))
    rows = iter(
        Encoded(row.input_ids, [flag and at >= begin for at, flag in enumerate(row.supervised)])
        for row, begin in zip(encode_all(tokenizer, conversations), begins, strict=True)
    )
    return [[next(rows) for _ in texts] for texts in offered]


@torch.no_grad()
def _log_likelihoods(model: Any, questions: Sequence[Sequence[Encoded]]) -> list[list[list[float]]]:
    """Return of each question [options, 2]: an option's log-likelihood in nats, and its tokens.

    What the options of a question begin with is run through the model once, if it keeps the keys
    and values of all of it; they follow on these.
    """
    rows = [row for options in questions for row in options]
    begins = [_in_common(options) for options in questions]
    shared = min(begins) > 0 and _keeps_all_keys(model)
    starts = [n for n, options in zip(begins, questions, strict=True) for _ in options]
    if shared:
        rows = [
            Encoded(row.input_ids[n:], row.supervised[n:])
            for row, n in zip(rows, starts, strict=True)
        ]
    batch = collate([(0, row) for row in rows], padding=padding_for(model)).to(model.device)
    inputs = batch.model_inputs()
    if shared:
        prompts = [options[0].input_ids[:n] for n, options in zip(begins, questions, strict=True)]
        inputs |= _after(model, prompts, [len(options) for options in questions])
        start, last = torch.tensor([starts, [len(row.input_ids) - 1 for row in rows]])
        places = torch.minimum(torch.arange(batch.input_ids.shape[1]), last[:, None])
        inputs["position_ids"] = (start[:, None] + places).to(model.device)
        ones = torch.ones_like(batch.input_ids)
        inputs["attention_mask"] = torch.cat([inputs["attention_mask"], ones], dim=1)
    states = decoder(model)(**inputs).last_hidden_state.flatten(0, 1)[batch.positions]
    labels = batch.labels.flatten()[batch.positions]
    losses = vocabulary_losses(states, output_head(model), labels=labels)
    assert losses.per_token.next_token is not None, "labels were given"
    found = -losses.per_token.next_token.double()
    sums = found.new_zeros((len(rows), 2))
    per_token = torch.stack([found, torch.ones_like(found)], dim=1)
    sums.index_add_(0, batch.positions // batch.input_ids.shape[1], per_token)
    by_row = iter(sums.tolist())
    return [[next(by_row) for _ in options] for options in questions]


def _in_common(options: Sequence[Encoded]) -> int:
    """Return how many tokens all options begin with, less those whose next token is supervised."""
    first = options[0].input_ids
    ends = [next((i for i, f in enumerate(o.supervised) if f), 1) - 1 for o in options]
    end = min(*ends, *(len(o.input_ids) - 1 for o in options))
    rest = [o.input_ids for o in options[1:]]
    return next((i for i in range(end) if any(ids[i] != first[i] for ids in rest)), end)


def _keeps_all_keys(model: Any) -> bool:
    """Whether each layer attends to all that comes before, and keeps it for what follows."""
    layers = DynamicCache(config=model.config).layers
    return all(type(layer) is DynamicLayer for layer in layers)


def _after(model: Any, prompts: Sequence[Sequence[int]], copies: Sequence[int]) -> dict[str, Any]:
    """Return what a forward pass on so many continuations of each prompt takes of the prompts."""
    longest = max(map(len, prompts))
    ids = torch.zeros((len(prompts), longest), dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt) :] = torch.tensor(prompt)
        mask[row, longest - len(prompt) :] = 1
    ids, mask = ids.to(model.device), mask.to(model.device)
    places = (mask.cumsum(dim=1) - 1).clamp_min(0)
    known = decoder(model)(
        input_ids=ids, attention_mask=mask, position_ids=places, use_cache=True
    ).past_key_values
    owners = torch.arange(len(prompts)).repeat_interleave(torch.tensor(copies)).to(model.device)
    known.batch_select_indices(owners)
    return {"past_key_values": known, "attention_mask": mask[owners], "use_cache": True}
