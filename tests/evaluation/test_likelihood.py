"""Options scored by likelihood against one forward pass an option, all logits held."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from dominie.core.errors import InputError
from dominie.data.conversations import Conversation
from dominie.data.tokenization import encode
from dominie.evaluation.likelihood import candidates, choice
from dominie.evaluation.task import questions

OPTIONS = ["red", "blue green red black", "green blue"]


def conversation(prompt: str, answer: str, **fields: Any) -> Conversation:
    messages = [
        {"role": "user", "content": "red"},
        {"role": "assistant", "content": "blue blue"},
        {"role": "user", "content": prompt},
        {"role": "assistant", "content": answer},
    ]
    return Conversation(messages, where="d.jsonl:1", fields=fields)


def naive(model, tokenizer, row: Conversation, option: str) -> tuple[float, int]:
    """Log-likelihood of an option as the last answer, and its tokens."""
    messages = [*row.messages[:-1], {"role": "assistant", "content": option}]
    ids, supervised = encode(tokenizer, Conversation(messages))
    last = max(i for i, flag in enumerate(supervised) if not flag) + 1
    with torch.no_grad():
        logits = torch.log_softmax(model(input_ids=torch.tensor([ids])).logits[0], -1)
    return sum(float(logits[i - 1, ids[i]]) for i in range(last, len(ids))), len(ids) - last


@pytest.mark.parametrize("likelihood", ["sum", "tokens", "bytes"])
@pytest.mark.parametrize("batch", [1, 4, 64])
def test_the_most_likely_option_is_the_answer(model, tokenizer, likelihood, batch):
    prompts = ["black", "green red", "blue blue blue", "red black red green", "green"]
    rows = [
        conversation(prompt, OPTIONS[i % 3], options=OPTIONS) for i, prompt in enumerate(prompts)
    ]
    scored = choice(
        model, tokenizer, questions(tokenizer, rows), likelihood=likelihood, batch=batch
    )
    right = 0
    for row, sample in zip(rows, scored.samples, strict=True):
        found = []
        for option in OPTIONS:
            total, tokens = naive(model, tokenizer, row, option)
            found.append(total / {"sum": 1, "tokens": tokens, "bytes": len(option)}[likelihood])
        assert sample["log_likelihoods"] == pytest.approx(found, abs=1e-4)
        assert sample["output"] == OPTIONS[found.index(max(found))]
        right += sample["output"] == row.answer
    assert scored.result.score == right / 5
    assert scored.result.n == 5


def test_length_decides_only_where_it_may(model, tokenizer):
    """Summed, a short option wins more often than divided by its tokens."""
    rows = [
        conversation(" ".join(("red", "blue", "green", "black")[: i % 4 + 1] * (i // 4 + 1)), "red")
        for i in range(12)
    ]
    rows = [Conversation(r.messages, fields={"options": OPTIONS}) for r in rows]
    asked = questions(tokenizer, rows)
    scores = {
        kind: choice(model, tokenizer, asked, likelihood=kind).result.score
        for kind in ("sum", "tokens")
    }
    assert scores["sum"] > scores["tokens"]


def test_options_are_answers_or_their_labels():
    assert candidates(conversation("?", "b", options=["a", "b"]), "options") == (["a", "b"], 1)
    lettered = '["A: wool", "B: silk", "C: linen"]'
    assert candidates(conversation("?", "B", options=lettered), "options") == (["A", "B", "C"], 1)
    whole = candidates(conversation("?", "B: silk", options=lettered), "options")
    assert whole == (["A: wool", "B: silk", "C: linen"], 1)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "no options to choose from"),
        ({"options": ["a"]}, "no options to choose from"),
        ({"options": "a or b"}, "no options to choose from"),
        ({"options": ["a", "b"]}, "none of the options"),
    ],
)
def test_rows_without_a_choice_are_refused(fields, message):
    with pytest.raises(InputError, match=rf"d\.jsonl:1.*{message}"):
        candidates(conversation("?", "c", **fields), "options")
