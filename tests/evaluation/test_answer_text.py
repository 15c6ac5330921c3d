"""What is found in the texts that models write."""

from __future__ import annotations

import json
import re
from pathlib import Path

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
        ("Here:\n1. C\n2. A\n3. B", [3, 1, 2]),
        ("1) item 3\n2) item 2", [3, 2]),
        ("3. C\n1. A", [3]),
        ("none of them", []),
        ("", []),
        ("1" * 5000, []),
    ],
)
def test_a_ranking_is_read_from_its_first_line(text, items):
    assert ranking(text) == items


DOCS = Path(__file__).parents[2] / "docs" / "evaluation.md"
(LETTERS,) = re.findall(r"mood: .*extract: '(.*?)'", DOCS.read_text("utf-8"))


@pytest.mark.parametrize(
    ("output", "letter"),
    [
        ("Based on what is said, I would go for E.", "E"),
        ("Clearly negative: D", "D"),
        ("Definitely A.", "A"),
        ("A good lamp, so the answer is B", "B"),
        ("C: neutral", "C"),
        ("(D) negative", "D"),
        ("**E**", "E"),
        ("答案是B。", "B"),
        ("选Ｃ，因为很好", "C"),
        ("답은 D입니다", None),
        ("Don't know", None),
        ("Better than expected", None),
    ],
)
def test_the_letter_pattern_of_the_documentation_reads_letters_not_initials(output, letter):
    assert extract(LETTERS, output) == letter
    assert extract(LETTERS.replace("A-E", "A-T"), output) == letter


def test_a_letter_inside_a_word_is_no_match():
    assert extract(r"^\s*([A-E])", "Based on this") is None
    assert extract(r"([A-E])", "Based on this: E") == "E"
    assert extract(r"([a-z])", "I'd take c") == "c"
    assert extract(r"'([A-E])'", "It is 'B'") == "B"
    assert extract(r"^\s*([A-E])", "B: fair") == "B"
    assert extract(r"^(\d)", "12") == "1", "digits are cut where the pattern says"


def test_a_pattern_is_tried_on_what_the_text_reads_as():
    assert extract(r"caf(é)", "cafe\u0301") == "é"
    assert extract(r"Answer: (\d+)", "Ａｎｓｗｅｒ：　１２") == "12"
    assert extract(r"答案：(\S+)", "答案：圆领") == "圆领"


def test_a_label_in_any_script_is_read_with_its_punctuation():
    labels = ["匹配", "不匹配"]
    assert [label_of(text, labels) for text in ("匹配。", "「不匹配」", "匹配 不匹配")] == [
        0,
        1,
        None,
    ]
    assert label_of("ｙｅｓ！", ["no", "yes"]) == 1
    assert label_of("C", ["C#", "C"]) == 1
    assert label_of("c#.", ["C", "C#"]) == 1
    assert label_of("+", ["-", "+"]) == 1
    assert label_of("?", ["!", "?"]) == 1


@pytest.mark.parametrize(
    "text",
    [
        "棉、丝；毛",
        "棉，丝，毛。",
        "1、棉\n2、丝\n3、毛",
        "１．棉\n２．丝\n３．毛",
        "①棉\n②丝\n③毛",
        "・棉\n・丝\n・毛",
        "［“棉”，“丝”，“毛”］",
        '```json\n["棉", "丝", "毛"]\n```',
        "好的：['棉', '丝', '毛',]。",
        '{"材料": ["棉", "丝", "毛"]}',
        "```\n棉\n丝\n毛\n```",
        '["棉", "丝"]\n["毛"]',
    ],
)
def test_spans_with_the_separators_of_chinese(text):
    assert spans(text) == {"棉", "丝", "毛"}


def test_spans_with_the_separators_of_other_scripts():
    assert spans("قطن، صوف؛ حرير") == {"قطن", "صوف", "حرير"}
    assert spans("ጥጥ፣ ሐር፤ ሱፍ።") == {"ጥጥ", "ሐር", "ሱፍ"}
    assert spans("1、2、3") == {"1", "2", "3"}, "a list of numbers, not an item of one"
    assert spans("see [[1]] and [2]") == {"see [[1]] and [2"}, "brackets of prose"


PAIRS = [{"attribute": "Fit", "value": "slim"}, {"attribute": "Age", "value": ["9", "10"]}]
TEXT = json.dumps(PAIRS)


@pytest.mark.parametrize(
    "text",
    [
        f"```json\n{TEXT}\n```",
        json.dumps(TEXT),
        f"~~~\n{TEXT}\n~~~",
        f"Sure! The pairs are:\n{TEXT}\nAnything else?",
        repr(PAIRS),
        f"Result = {PAIRS!r} (see [1])",
        "\n".join(json.dumps(pair) for pair in PAIRS),
        json.dumps({"attributes": PAIRS}),
        json.dumps({"result": {"Fit": "slim", "Age": ["9", "10"]}}, indent=2),
        TEXT.replace("attribute", "Attribute").replace("value", "VALUE"),
        TEXT.replace('"', "”").replace(",", "，").replace(":", "："),
        "Fit： slim；Age∶ 9、10。",
        "```\n- **Fit**: slim\n- **Age**: 9, 10\n```",
    ],
)
def test_pairs_are_found_whatever_stands_around_them(text):
    assert attribute_pairs(text) == {("fit", "slim"), ("age", "9"), ("age", "10")}


@pytest.mark.parametrize(
    "text",
    [
        TEXT[:-5],
        f"```json\n{TEXT[:40]}",
        "{fit: slim, age: 9}",
        '{"attribute": "Fit", "val": "slim"}',
        '[{"attribute": "Fit", "value": {"of": "legs"}}]',
        'The list is: ["slim", "9"]',
        '[{"' * 50_000,
        "[" * 100_000 + '"',
    ],
    ids=range(8),
)
def test_lists_of_another_form_are_no_pairs(text):
    assert attribute_pairs(text) is None


def test_an_empty_list_within_a_sentence_is_an_answer():
    assert attribute_pairs("There are none: []") == set()


@pytest.mark.parametrize(
    ("text", "items"),
    [
        ("第3、第1", [3, 1]),
        ("2번, 1번", [2, 1]),
        ("③②①", [3, 2, 1]),
        ("３＞１", [3, 1]),
        ("٣، ١", [3, 1]),
        ("选B、A", [2, 1]),
        ("I'd say C, A", [3, 1]),
        ("iPhone13, А5", []),
        ("٤٫٥ نجوم", []),
    ],
)
def test_rankings_of_other_scripts(text, items):
    assert ranking(text) == items
