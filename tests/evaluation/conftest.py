"""A tokenizer of words and tiny models whose answers vary in content and length."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from tiny import tiny_model

from dominie.data.conversations import Conversation
from dominie.evaluation.task import Question, questions
from dominie.toyworld.toy_models import WORDS, word_tokenizer

END = 3


def model_of(seed: int, vocabulary: int) -> Any:
    model = tiny_model(
        seed=seed,
        dtype=torch.float64,
        vocab_size=vocabulary,
        hidden_size=32,
        intermediate_size=48,
        max_position_embeddings=128,
        initializer_range=0.6,
        bos_token_id=2,
        eos_token_id=END,
        pad_token_id=0,
    ).eval()
    model.lm_head.weight.data[END] *= 2.5  # so that answers end
    return model


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    return word_tokenizer()


@pytest.fixture(scope="session")
def model(tokenizer) -> Any:
    return model_of(1, len(tokenizer))


@pytest.fixture(scope="session")
def teacher(tokenizer) -> Any:
    return model_of(2, len(tokenizer))


@pytest.fixture(scope="session")
def asked(tokenizer) -> list[Question]:
    """Questions of many lengths in two groups and one without."""
    rng = np.random.default_rng(0)
    conversations = []
    for number in range(23):
        words = [WORDS[i] for i in rng.integers(0, len(WORDS), int(rng.integers(1, 12)))]
        fields = {"family": "even" if number % 2 else "odd"} if number else {}
        messages = [
            {"role": "user", "content": " ".join(words)},
            {"role": "assistant", "content": " ".join(words[:3])},
        ]
        conversations.append(Conversation(messages, where="d.jsonl:1", fields=fields))
    return questions(tokenizer, conversations, by="family")
