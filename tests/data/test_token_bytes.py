"""The bytes of tokens, and maps between vocabularies, by examples and against a naive search."""

from __future__ import annotations

import pytest
from tiny_tokenizers import TEXTS, byte_level, sentence_piece, word_piece
from transformers import PreTrainedTokenizerBase

from dominie.core.errors import InputError
from dominie.data.token_bytes import END, TokenBytes, token_bytes, vocabulary_map

HOSTILE = [*TEXTS, "👩‍🏫🏳️‍🌈", "e\u0301\u0323 a\u0308", "東京", "\n\n\t  x", "\u00a0\u2028 ﬁ"]


@pytest.mark.parametrize("make", [byte_level, sentence_piece])
@pytest.mark.parametrize("text", HOSTILE)
def test_tokens_spell_the_text(make, text):
    tokenizer = make()
    table = token_bytes(tokenizer)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert b"".join(table.of[i] for i in ids) == text.encode()


def test_words_have_a_space_before_them_and_what_goes_on_has_none():
    table = token_bytes(word_piece())
    ids = word_piece()("the dogs, naïve", add_special_tokens=False)["input_ids"]
    assert b"".join(table.of[i] for i in ids) == b" the dogs, naive"


@pytest.mark.parametrize("make", [byte_level, sentence_piece, word_piece])
def test_ends_of_turns_are_one_outcome_and_other_marks_are_none(make):
    table, vocabulary = token_bytes(make()), make().get_vocab()
    end, start = ("<|im_end|>", "<|im_start|>") if make is byte_level else ("<end>", "<start>")
    assert table.of[vocabulary[end]] == END
    assert table.of[vocabulary[start]] is None
    assert table.ids[END] == vocabulary[end]
    assert [i for i, each in enumerate(table.of) if each and END in each] == [vocabulary[end]]


def test_a_character_has_a_token_before_it_has_bytes():
    table, vocabulary = token_bytes(sentence_piece()), sentence_piece().get_vocab()
    assert table.of[vocabulary["<0x61>"]] == b"a"
    assert table.ids[b"a"] == vocabulary["a"]


@pytest.mark.parametrize("teacher", [byte_level, sentence_piece, word_piece])
@pytest.mark.parametrize("student", [byte_level, sentence_piece, word_piece])
def test_each_token_maps_to_the_longest_that_it_begins_with(teacher, student):
    theirs, ours = token_bytes(teacher()), token_bytes(student())
    found = vocabulary_map(theirs, ours)
    for token, to in zip(theirs.of, found.longest.tolist(), strict=True):
        begins = [each for each in ours.ids if token and token.startswith(each)]
        assert (ours.of[to] if to >= 0 else b"") == max(begins, key=len, default=b"")
    image = {ours.of[i] for i in found.longest.tolist() if i >= 0}
    for index, (token, to) in enumerate(zip(ours.of, found.fold.tolist(), strict=True)):
        begins = [each for each in image if token and token.startswith(each)]
        if index in found.longest or not begins:
            assert to == index
        else:
            assert ours.of[to] == max(begins, key=len)
    assert found.same == (teacher is student)


def test_a_slow_tokenizer_is_refused():
    class Slow(PreTrainedTokenizerBase):
        is_fast = False

    with pytest.raises(InputError, match="bytes of its tokens are not known"):
        token_bytes(Slow())


def test_of_several_tokens_with_the_same_bytes_one_is_chosen():
    student = TokenBytes([b"a", b"a", b"ab"], frozenset({0}))
    assert vocabulary_map(TokenBytes([b"abc", b"ac", b"x"]), student).longest.tolist() == [2, 1, -1]
