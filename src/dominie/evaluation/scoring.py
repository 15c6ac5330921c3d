"""Scores the questions of a task: generated answers, options by likelihood."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from typing import Any, Literal

import torch

from dominie.core.errors import InputError
from dominie.data.batch import collate
from dominie.data.conversations import Conversation
from dominie.data.ecommerce_formats import listed
from dominie.data.tokenization import Encoded, encode_all
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
from dominie.evaluation.text_forms import normalise
from dominie.generation.generator import Generation, GenerationRequest, Sampling, generate_all
from dominie.generation.local import LocalGenerator
from dominie.losses.vocabulary import vocabulary_losses
from dominie.models.head import decoder, output_head

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
        model: in evaluation mode.
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
    return scored(
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


def scored(
    questions: Sequence[Question],
    sums: Sequence[Sequence[float]],
    statistic: str = "ratio",
    **more: Any,
) -> ScoredTask:
    """Compute a task's result from the sums of its questions, one row of sums for each."""
    return score_items(
        sums,
        statistic,
        questions=[question.prompt for question in questions],
        groups=[question.group for question in questions],
        **more,
    )


_LABEL = re.compile(r"\s*[(（]?([^\W\d_]|\d+)[).:）．：、](?:\s|(?=[^\x00-\x7f]))")


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
    that no option wins for being the beginning of another. Ranks share the options.

    Args:
        model: in evaluation mode.
        tokenizer: of the questions, too.
        options: the field that lists the options.
        likelihood: the sum over an option's tokens, or that divided by tokens or by bytes.
        batch: options per forward pass.

    Raises:
        InputError: a row without options, or whose target is none of them.
    """
    offered = [candidates(question.conversation, options) for question in questions]
    rows = _encoded(tokenizer, questions, [texts for texts, _ in offered])
    owners = [(i, j) for i, (texts, _) in enumerate(offered) for j in range(len(texts))]

    def log_likelihoods(members: list[int]) -> list[list[float]]:
        return _log_likelihoods(model, [rows[r] for r in members])

    lengths = [len(row.input_ids) for row in rows]
    totals = compute_over_ranks(lengths, batch, log_likelihoods, track)
    found: list[list[float]] = [[] for _ in questions]
    for (i, j), (total, tokens) in zip(owners, totals, strict=True):
        units = {"sum": 1, "tokens": tokens, "bytes": len(offered[i][0][j].encode())}
        found[i].append(total / max(1, units[likelihood]))
    samples = []
    for question, (texts, right), values in zip(questions, offered, found, strict=True):
        chosen = max(range(len(values)), key=values.__getitem__)
        sample = _sample(question, texts[right], texts[chosen], float(chosen == right))
        samples.append(sample | {"log_likelihoods": [round(value, 4) for value in values]})
    return scored(questions, [(sample["score"], 1.0) for sample in samples], samples=samples)


def candidates(conversation: Conversation, field: str) -> tuple[list[str], int]:
    """Return the answers a row offers and which of them is right.

    Options are answers as they stand, or labels if the target is the label of one (`B` of
    `B: wool`).

    Raises:
        InputError: no options, one alone, or a target that is none of them.
    """
    given = listed(conversation.fields.get(field))
    if given is None or len(given) < 2:
        raise InputError(
            f"the row has no options to choose from in the field {field!r}",
            where=conversation.where,
            expected="a list of two or more, or the JSON of one",
            found=repr(conversation.fields.get(field))[:80],
            do=f"fields of this row: {', '.join(conversation.fields) or 'none'}",
        )
    texts = [str(option) for option in given]
    target = normalise(conversation.answer)
    plain = [normalise(text) for text in texts]
    if target in plain:
        return texts, plain.index(target)
    matches = [_LABEL.match(text) for text in texts]
    labels = [match.group(1) for match in matches if match]
    plain = [normalise(label) for label in labels]
    if len(labels) == len(texts) and target in plain:
        return labels, plain.index(target)
    raise InputError(
        "the target is none of the options",
        where=conversation.where,
        expected=" | ".join(texts)[:200],
        found=repr(target)[:80],
    )


def _encoded(
    tokenizer: Any, questions: Sequence[Question], offered: Sequence[Sequence[str]]
) -> list[Encoded]:
    """Encode each question with each option for an answer; only that answer is supervised."""
    conversations, begins = [], []
    for question, texts in zip(questions, offered, strict=True):
        for text in texts:
            messages = [*question.asked, {"role": "assistant", "content": text}]
            chat = dataclasses.replace(question.conversation, messages=messages, weights=())
            conversations.append(chat)
            begins.append(len(question.prompt_ids))
    return [
        Encoded(row.input_ids, [flag and at >= begin for at, flag in enumerate(row.supervised)])
        for row, begin in zip(encode_all(tokenizer, conversations), begins, strict=True)
    ]


@torch.no_grad()
def _log_likelihoods(model: Any, rows: Sequence[Encoded]) -> list[list[float]]:
    """Return [B, 2]: the log-likelihood of each row's answer in nats, and its tokens."""
    batch = collate([(0, row) for row in rows]).to(model.device)
    supervised = batch.supervised
    hidden = decoder(model)(**batch.model_inputs()).last_hidden_state[supervised]
    losses = vocabulary_losses(hidden, output_head(model), labels=batch.labels[supervised])
    assert losses.per_token.next_token is not None, "labels were given"
    log_likelihood = -losses.per_token.next_token.double()
    per_token = torch.stack([log_likelihood, torch.ones_like(log_likelihood)], dim=1)
    return summed_by_row(per_token, supervised)


def summed_by_row(per_token: torch.Tensor, supervised: torch.Tensor) -> list[list[float]]:
    """Sum [N, K] values of the N supervised tokens of [B, L] by row."""
    sums = per_token.new_zeros((len(supervised), per_token.shape[1]))
    sums.index_add_(0, supervised.nonzero()[:, 0], per_token)
    found: list[list[float]] = sums.tolist()
    return found
