import itertools

import pytest

from dominie.data.chat_template import ChatTemplate, with_written_marks

CHAT = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "one"}]


def marked(tokenizer, template, messages=CHAT):
    tokenizer.chat_template = template
    text, marks = ChatTemplate(tokenizer).text_and_marks(messages, None, where="x:1")
    return [text[slice(*mark)] for mark in marks]


@pytest.mark.parametrize("family", ["marked", "marked_macro", "marked_last"])
def test_marks_are_where_the_template_sets_them(make_tokenizer, family):
    tokenizer = make_tokenizer(family)
    expected = "one" if family == "marked" else "one<|im_end|>"
    assert marked(tokenizer, tokenizer.chat_template) == [expected]


SIGNS = ["", "-", "+"]


@pytest.mark.parametrize("outer", ["", " ", "\n", "\n  ", " \n\n "])
@pytest.mark.parametrize("inner", ["", " ", "\n", "\n  ", " \n\n "])
def test_writing_the_marks_changes_no_white_space(make_tokenizer, outer, inner):
    tokenizer = make_tokenizer("marked")
    # The signs of the two tags are independent: each is seen with every other in its place.
    for left, right in itertools.product(SIGNS, repeat=2):
        template = (
            "{% for m in messages %}{{ m['role'] }}"
            f"{outer}{{%{left} generation {right}%}}{inner}{{{{ m['content'] }}}}"
            f"{inner}{{%{right} endgeneration {left}%}}{outer}"
            "{% endfor %}"
        )
        pieces = marked(tokenizer, template)
        assert len(pieces) == 2, template
        assert [piece.strip() for piece in pieces] == ["a", "one"]


def test_a_template_without_marks_is_left_as_it_is():
    template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    assert with_written_marks(template) == template


def test_marks_in_a_captured_block_that_is_cut_are_not_trusted(make_tokenizer):
    template = (
        "{% for m in messages %}{% set text %}"
        "{% generation %} {{ m['content'] }} {% endgeneration %}"
        "{% endset %}{{ text | trim }}{% endfor %}"
    )
    assert marked(make_tokenizer("marked"), template) == []


def test_characters_of_marks_in_a_content_are_no_marks(make_tokenizer):
    tokenizer = make_tokenizer("marked")
    messages = [CHAT[0], {"role": "assistant", "content": "o\ufdd0n\ufdd1e"}]
    assert marked(tokenizer, tokenizer.chat_template, messages) == []
