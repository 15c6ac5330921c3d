"""What is found in the texts that models write."""

from __future__ import annotations

import pytest

from dominie.data.ecommerce_formats import listed
from dominie.evaluation.answer_text import attribute_pairs, extract, label_of, ranking, spans


def test_the_first_group_of_the_first_match_is_the_answer():
    assert extract(None, " as it is ") == " as it is "
    assert extract(r"answer is (\w+)|=\s*(\w+)", "so = 7, the answer is 8") == "7"
    assert extract(r"\d+", "12 or 13") == "12"
    assert extract(r"(?s)(\d+)(?!.*\d)", "12 or\n13.") == "13", "the last, if asked for"
    assert extract(r"\d+", "none") is None


@pytest.mark.parametrize(
    ("text", "index"),
    [("yes", 1), ("Yes.", 1), (" **YES**\n", 1), ("yes, it is", None), ("", None), ("no", 0)],
)
def test_a_label_is_the_whole_answer(text, index):
    assert label_of(text, ["no", "yes"]) == index


def test_lists_are_read_as_json_and_as_python_write_them():
    assert listed('["A: red", "B: blue"]') == ["A: red", "B: blue"]
    assert listed("['A: a boy\\'s', 'B: 2']") == ["A: a boy's", "B: 2"]
    assert listed(["a", 1]) == ["a", 1]
    assert listed("A, B") is None
    assert listed("[broken") is None
    assert listed("[" * 100_000) is None
    assert listed("__import__('os')") is None


def test_spans_are_set_apart_by_commas_and_lines():
    assert spans("Red, BLUE ;green\n- a  hat.") == {"red", "blue", "green", "a hat"}
    assert spans('["Red", "blue"]') == {"red", "blue"}
    assert spans("1. red\n2. blue") == {"red", "blue"}
    assert spans("None") == spans("") == spans("[]") == set()


def test_pairs_are_read_from_json_and_from_lines():
    expected = {("color", "red"), ("color", "blue"), ("size", "m")}
    assert attribute_pairs('{"Color": ["red", "Blue"], "size": "M"}') == expected
    assert attribute_pairs("color: red, blue\nsize: M\nfit: None") == expected
    assert attribute_pairs('[{"attribute": "size", "value": "M"}]') == {("size", "m")}
    assert attribute_pairs('{"attribute": "size", "value": "M"}') == {("size", "m")}
    assert attribute_pairs('[{"attribute": "size", "value": null}]') == set()
    assert attribute_pairs("[]") == attribute_pairs("") == set()
    assert attribute_pairs("it is red") is None
    assert attribute_pairs('["red"]') is None
    assert attribute_pairs("[1, 2") is None


@pytest.mark.parametrize(
    ("text", "items"),
    [
        ("3,1,2", [3, 1, 2]),
        ("3, 1,3, 2", [3, 1, 2]),
        ("Ranking:\n2 > 1 > 3\n4", [2, 1, 3]),
        ("B,A , c", [2, 1, 3]),
        ("[2, 1]", [2, 1]),
        ("I rank 2, 1", [2, 1]),
        ("4.5 stars", []),
        ("none of them", []),
        ("", []),
        ("1" * 5000, []),
    ],
)
def test_a_ranking_is_read_from_its_first_line(text, items):
    assert ranking(text) == items
