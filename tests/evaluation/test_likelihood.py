"""Options that follow on one forward pass of their prompt are as likely as each on its own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny import tiny_model

from dominie.data.conversations import Conversation
from dominie.evaluation import likelihood
from dominie.evaluation.task import questions


def rows() -> list[Conversation]:
    """Questions of several lengths, with two to four options, some of which begin alike."""
    offered = [["red", "blue green red", "blue red"], ["green", "green blue"], ["a", "b", "c", "d"]]
    asked = ["black", "red green blue red", "blue blue", "green red black", "red"]
    return [
        Conversation(
            [{"role": "user", "content": text}, {"role": "assistant", "content": options[0]}],
            where="d.jsonl:1",
            fields={"options": options},
        )
        for i, text in enumerate(asked)
        for options in [offered[i % 3]]
    ]


def scored(model: Any, tokenizer: Any, batch: int) -> tuple[list[list[float]], list[int]]:
    """The options' log-likelihoods, and the positions of each forward pass."""
    positions: list[int] = []
    hook = model.model.register_forward_pre_hook(
        lambda _, __, given: positions.append(given["input_ids"].numel()), with_kwargs=True
    )
    try:
        found = likelihood.choice(model, tokenizer, questions(tokenizer, rows()), batch=batch)
    finally:
        hook.remove()
    return [sample["log_likelihoods"] for sample in found.samples], positions


@pytest.mark.parametrize(
    ("family", "is_shared"),
    [("llama", True), ("qwen3", True), ("qwen2", True), ("gemma3_text", False)],
)
def test_a_prompt_is_read_once_where_the_model_keeps_it_whole(
    tokenizer, family, is_shared, monkeypatch
):
    model = tiny_model(
        family, dtype=torch.float64, vocab_size=len(tokenizer), max_position_embeddings=32
    ).eval()
    together = {batch: scored(model, tokenizer, batch) for batch in (1, 8, 64)}
    monkeypatch.setattr(likelihood, "_keeps_all_keys", lambda _: False)
    alone, positions = scored(model, tokenizer, 64)
    for found, passes in together.values():
        assert found == [pytest.approx(each, abs=2e-4) for each in alone]
        assert len({value for values in found for value in values}) > 10, "options differ"
        assert (len(passes) % 2 == 0 and len(passes) >= 2) == is_shared
    assert (sum(together[64][1]) < sum(positions)) == is_shared


def test_what_options_share_ends_before_what_predicts_them(tokenizer):
    (row,) = rows()[:1]
    asked = questions(tokenizer, [row])
    offered = [row.fields["options"], ["red", "red blue"], ["red"]]
    prompt = len(asked[0].prompt_ids)
    for options in offered:
        (encoded,) = likelihood._encoded(tokenizer, asked, [options])
        assert likelihood._in_common(encoded) == prompt - 1
