"""A teacher with the same tokens in another order speaks as the one it was made from."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from dominie.core.errors import InputError
from dominie.models.tokenizer_compat import adopt_ids, token_map

SIZE = 12


def tokenizer(tokens: list[str]) -> SimpleNamespace:
    return SimpleNamespace(get_vocab=lambda: {t: i for i, t in enumerate(tokens) if t})


def model(tied: bool) -> torch.nn.Module:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=SIZE,
        hidden_size=8,
        intermediate_size=12,
        num_hidden_layers=1,
        num_attention_heads=2,
        tie_word_embeddings=tied,
        initializer_range=0.5,
    )
    return AutoModelForCausalLM.from_config(config).double().eval().requires_grad_(False)


@pytest.mark.parametrize("tied", [True, False])
def test_ids_are_the_student_s_afterwards(tied):
    tokens = [f"t{i}" for i in range(SIZE - 2)]  # and two padding rows
    order = torch.randperm(SIZE - 2, generator=torch.Generator().manual_seed(1)).tolist()
    theirs = tokenizer([tokens[i] for i in order])
    original, shuffled = model(tied), model(tied)
    adopt_ids(shuffled, torch.tensor([*order, SIZE - 2, SIZE - 1]))  # a teacher of other order
    assert shuffled.lm_head.bias is None
    ids = torch.randint(SIZE - 2, (2, 7), generator=torch.Generator().manual_seed(2))
    expected = original(input_ids=ids).logits
    assert not torch.allclose(shuffled(input_ids=ids).logits, expected)
    mapped = token_map(tokenizer(tokens), theirs, size=SIZE, where="here")
    assert sorted(mapped.tolist()) == list(range(SIZE))
    adopt_ids(shuffled, mapped)
    torch.testing.assert_close(shuffled(input_ids=ids).logits, expected)


def test_gaps_are_filled_with_rows_nobody_uses():
    mapped = token_map(
        tokenizer(["a", "", "b"]), tokenizer(["", "b", "", "a"]), size=5, where="here"
    )
    assert mapped.tolist() == [3, 0, 1, 2, 4]


@pytest.mark.parametrize(
    ("ours", "theirs", "said"),
    [
        (["a", "b"], ["b", "c"], "'a', 'c'"),
        (["a", "b", "c"], ["b", "a"], "'c'"),
        ([""] * 6 + ["a"], ["a"], "ids below 5"),
    ],
)
def test_other_tokens_cannot_be_mapped(ours, theirs, said):
    with pytest.raises(InputError) as refused:
        token_map(tokenizer(ours), tokenizer(theirs), size=5, where="here")
    assert said in str(refused.value)
    assert str(refused.value).startswith("here: ")
