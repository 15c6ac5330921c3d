"""Same tokens, and all of them known; conversations within the context."""

from __future__ import annotations

import pytest

from dominie.core.errors import InputError
from dominie.models.info import ModelInfo
from dominie.models.tokenizer_compat import (
    check_context,
    check_same_tokens,
    check_vocabulary,
    differing_ids,
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
