"""Same tokens, and all of them known; conversations within the context; layers and heads."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from tiny import tiny_model

from dominie.core.errors import InputError
from dominie.models.info import ModelInfo
from dominie.models.matching import (
    check_context,
    check_heads,
    check_same_tokens,
    check_vocabulary,
    differing_ids,
    map_layers,
    reorder_vocabulary,
    token_map,
)


class Tokens:
    """As much of a tokenizer as the comparison needs."""

    def __init__(self, *tokens: str) -> None:
        self.tokens = tokens

    def get_vocab(self) -> dict[str, int]:
        return {token: i for i, token in enumerate(self.tokens) if token}


def test_the_same_map_passes_in_any_order_of_words():
    one, other = Tokens("a", "b", "c"), Tokens("a", "b", "c")
    other.get_vocab = lambda: {"c": 2, "a": 0, "b": 1}
    assert differing_ids(one, other) == []
    check_same_tokens(one, other, where="here")


@pytest.mark.parametrize(
    ("student", "teacher"),
    [
        (Tokens("a", "b"), Tokens("a", "b", "<extra>")),
        (Tokens("a", "b", "<extra>"), Tokens("a", "b")),
        (Tokens("a", "", "c"), Tokens("a", "b", "c")),
    ],
)
def test_ids_that_one_side_alone_knows_are_no_quarrel(student, teacher):
    check_same_tokens(student, teacher, where="here")


@pytest.mark.parametrize(
    ("student", "teacher", "ids"),
    [
        (Tokens("a", "b", "c"), Tokens("a", "c", "b"), [1, 2]),
        (Tokens("a", "b", "c"), Tokens("a", "x", "c"), [1]),
        (Tokens("a", "b"), Tokens("b", "x", "a"), [0, 1]),
        (Tokens("a", "b", "", "d"), Tokens("a", "", "b", "d"), [1]),
    ],
)
def test_maps_of_equal_size_may_differ(student, teacher, ids):
    assert differing_ids(student, teacher) == ids
    with pytest.raises(InputError) as caught:
        check_same_tokens(student, teacher, where="stages.s, teacher t")
    message = str(caught.value)
    assert message.startswith("stages.s, teacher t: ")
    assert f"id {ids[0]}" in message
    assert f"{len(ids)} ids differ" in message


def test_conversations_end_within_the_context():
    short = ModelInfo(name="short", origin="local", context=32)
    check_context(short, 32, where="here")
    check_context(ModelInfo(name="served", origin="server"), 10**9, where="not known")
    with pytest.raises(InputError, match=r"(?s)at most 32.*33.*train.max_length=32"):
        check_context(short, 33, where="here")
    with pytest.raises(InputError, match="shorter rows"):
        check_context(short, 33, where="here", do="shorter rows")


def test_tokens_need_an_embedding():
    known = ModelInfo(name="known", origin="local", vocabulary=100)
    check_vocabulary(ModelInfo(name="served", origin="server"), 10**6, where="not known")
    check_vocabulary(known, 99, where="here")
    check_vocabulary(known, -1, where="no rows")
    with pytest.raises(InputError, match=r"(?s)below 100.*id 100 in the data"):
        check_vocabulary(known, 100, where="here")


SIZE = 12


def tokenizer(tokens: list[str]) -> SimpleNamespace:
    return SimpleNamespace(get_vocab=lambda: {t: i for i, t in enumerate(tokens) if t})


def model(tied: bool) -> torch.nn.Module:
    changes = {"vocab_size": SIZE, "num_hidden_layers": 1, "tie_word_embeddings": tied}
    return tiny_model("llama", dtype=torch.float64, **changes).eval().requires_grad_(False)


@pytest.mark.parametrize("tied", [True, False])
def test_ids_are_the_student_s_afterwards(tied):
    tokens = [f"t{i}" for i in range(SIZE - 2)]  # and two padding rows
    order = torch.randperm(SIZE - 2, generator=torch.Generator().manual_seed(1)).tolist()
    theirs = tokenizer([tokens[i] for i in order])
    original, shuffled = model(tied), model(tied)
    reorder_vocabulary(
        shuffled, torch.tensor([*order, SIZE - 2, SIZE - 1])
    )  # a teacher of other order
    assert shuffled.lm_head.bias is None
    ids = torch.randint(SIZE - 2, (2, 7), generator=torch.Generator().manual_seed(2))
    expected = original(input_ids=ids).logits
    assert not torch.allclose(shuffled(input_ids=ids).logits, expected)
    mapped = token_map(tokenizer(tokens), theirs, size=SIZE, where="here")
    assert sorted(mapped.tolist()) == list(range(SIZE))
    reorder_vocabulary(shuffled, mapped)
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


@pytest.mark.parametrize(
    ("spec", "depths", "pairs"),
    [
        ("all", (3, 3), [(0, 0), (1, 1), (2, 2)]),
        ("uniform", (3, 3), [(0, 0), (1, 1), (2, 2)]),
        ("uniform", (2, 6), [(0, 2), (1, 5)]),
        ("uniform", (3, 5), [(0, 0), (1, 2), (2, 4)]),
        ("uniform", (4, 2), [(0, 0), (1, 0), (2, 0), (3, 1)]),
        ("last", (3, 5), [(2, 4)]),
        ({"last": 2}, (3, 5), [(1, 3), (2, 4)]),
        ({"every": 2}, (5, 5), [(1, 1), (3, 3)]),
        ({"every": 1}, (2, 2), [(0, 0), (1, 1)]),
        ([[1, 3], [0, 3]], (2, 4), [(0, 3), (1, 3)]),
        (((0, 0),), (1, 1), [(0, 0)]),
    ],
)
def test_layers(spec, depths, pairs) -> None:
    assert map_layers(spec, *depths) == pairs


@pytest.mark.parametrize(
    ("spec", "depths", "message"),
    [
        ("all", (2, 3), "layers: uniform"),
        ({"every": 2}, (4, 8), "layers: uniform"),
        ({"every": 5}, (4, 4), "no layer is mapped"),
        ({"every": 0}, (4, 4), "not a mapping"),
        ({"last": 4}, (3, 5), "no 4 last layers"),
        ({"first": 1}, (3, 3), "not a mapping"),
        ("every", (3, 3), "not a mapping"),
        (None, (3, 3), "not a mapping"),
        ([], (3, 3), "at least one pair"),
        ([[0, 0], [0, 0]], (3, 3), "each once"),
        ([[0, 3]], (3, 3), "does not exist"),
        ([[-1, 0]], (3, 3), "does not exist"),
        ([[0]], (3, 3), "not a pair"),
        ([[0, True]], (3, 3), "not a pair"),
        ([3], (3, 3), "not a pair"),
    ],
)
def test_layers_that_do_not_fit_are_an_input_error(spec, depths, message) -> None:
    with pytest.raises(InputError, match=message):
        map_layers(spec, *depths)


def test_heads() -> None:
    assert check_heads(4, 4) == 1
    assert check_heads(2, 8) == 4
    with pytest.raises(InputError, match="multiple of the student's 8 heads"):
        check_heads(8, 4)
    with pytest.raises(InputError, match="multiple of the student's 3 heads"):
        check_heads(3, 4)
