"""Every metric against numbers worked out by hand."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from dominie.core.errors import InputError
from dominie.data.conversations import Conversation
from dominie.evaluation.metrics import check_rows, grader, may_be_invalid, statistic_of
from dominie.evaluation.results import SampleScore
from dominie.evaluation.statistics import STATISTICS
from dominie.evaluation.task import Scoring


def row(target: str, **fields: Any) -> Conversation:
    messages = [{"role": "user", "content": "?"}, {"role": "assistant", "content": target}]
    return Conversation(messages, where="d.jsonl:7", fields=fields)


def grades(scoring: Scoring, *answers: tuple[str | None, Conversation]) -> list[SampleScore]:
    grade = grader(scoring)
    return [grade(answer, each) for answer, each in answers]


def total(scoring: Scoring, found: list[SampleScore]) -> float:
    sums = np.array([grade.sums for grade in found], dtype=float).sum(0)
    return float(STATISTICS[statistic_of(scoring)](sums))


def test_exact_match_ignores_white_space_and_what_it_is_told_to():
    strict = Scoring()
    found = grades(strict, (" red  hat\n", row("red hat")), ("Red hat.", row("red hat")))
    assert [grade.score for grade in found] == [1.0, 0.0]
    assert total(strict, found) == 0.5
    assert not may_be_invalid(strict)
    lenient = Scoring(ignore=["case", "punctuation", "articles"])
    found = grades(lenient, ("The Red hat.", row("a red hat")), ("theatre", row("atre")))
    assert [grade.score for grade in found] == [1.0, 0.0]


def test_what_is_extracted_is_compared():
    """As in GSM8K: the number after the four hashes, in target and output."""
    scoring = Scoring(extract=r"####\s*(-?[\d,]+)")
    target = row("2 + 2 = 4, twice is 8.\n#### 8")
    found = grades(scoring, ("8", target), (None, target), ("9", target))
    assert [grade.score for grade in found] == [1.0, 0.0, 0.0]
    assert [grade.valid for grade in found] == [True, False, True]
    assert may_be_invalid(scoring)


BINARY = Scoring(metric="binary_f1", labels=["no", "yes"], positive="yes")


def test_binary_f1_by_hand():
    """TP 2, FP 1, FN 1: 2·2 / (4 + 1 + 1)."""
    yes, no = row("yes"), row("no")
    found = grades(BINARY, ("Yes.", yes), (" yes", yes), ("no", yes), ("yes", no), ("NO", no))
    assert total(BINARY, found) == pytest.approx(4 / 6)
    assert [grade.score for grade in found] == [1, 1, 0, 0, 1]
    assert all(grade.valid for grade in found)


def test_an_answer_that_is_no_label_is_a_wrong_one():
    yes, no = row("yes"), row("no")
    found = grades(BINARY, ("yes", yes), ("maybe", yes), ("yes or no", no), (None, no))
    assert [grade.valid for grade in found] == [True, False, False, False]
    assert total(BINARY, found) == pytest.approx(2 / (2 + 2 + 1)), "TP 1, FP 2, FN 1"


def test_macro_f1_by_hand():
    """Of A: TP 1 FP 1 FN 1, F1 1/2; of B: TP 1 FP 1 FN 0, 2/3; of C: FN 1, 0; D is nowhere."""
    scoring = Scoring(metric="macro_f1", labels=["A", "B", "C", "D"], extract=r"^\s*([A-D])\b")
    answers = [("A", "A"), ("B", "A"), ("B", "B: fair"), ("A", "C"), ("D?", "C")]
    pairs = [(answer, row(target)) for answer, target in answers[:4]]
    found = grades(scoring, *pairs)
    assert total(scoring, found) == pytest.approx((1 / 2 + 2 / 3 + 0) / 3)
    found = grades(scoring, *pairs, ("nothing", row("A")))
    assert not found[-1].valid
    assert total(scoring, found) == pytest.approx((2 / 5 + 2 / 3 + 0) / 3), "FN of A"


def test_attribute_f1_by_hand():
    """Two of three found, one wrong value: TP 2, FP 1, FN 1."""
    scoring = Scoring(metric="attribute_f1")
    target = row('[{"attribute": "color", "value": "red"}, {"attribute": "size", "value": "M"}]')
    other = row('[{"attribute": "brand", "value": "Ada"}]')
    found = grades(
        scoring,
        ('[{"attribute": "Color", "value": "Red"}, {"attribute": "size", "value": "L"}]', target),
        ("brand: ada", other),
    )
    assert total(scoring, found) == pytest.approx(4 / 6)
    assert found[0].score == pytest.approx(1 / 2)
    assert all(grade.valid for grade in found)
    (bad,) = grades(scoring, ("it is red", target))
    assert (bad.valid, bad.sums) == (False, (0, 0, 2))


def test_a_source_counts_where_the_target_names_it():
    """As in ECInstruct's attribute value extraction."""
    scoring = Scoring(metric="attribute_f1")
    target = row('[{"attribute": "color", "value": "red", "source": "title"}]')
    right = '[{"attribute": "color", "value": "red", "source": "title"}]'
    wrong = right.replace("title", "price")
    assert [grade.score for grade in grades(scoring, (right, target), (wrong, target))] == [1, 0]
    plain = row("color: red")
    assert grades(scoring, (right, plain))[0].score == 1


def test_span_f1_by_hand():
    """TP 2, FP 2, FN 1."""
    scoring = Scoring(metric="span_f1")
    target = row("Pentium 4 processor, Toshiba, Webcam")
    (grade,) = grades(scoring, ("toshiba, webcam, DVD, USB", target))
    assert grade.sums == (2, 2, 1)
    assert total(scoring, [grade]) == pytest.approx(4 / 7)
    (listed,) = grades(scoring, ('["Toshiba", "Webcam"]', row('["toshiba"]')))
    assert listed.sums == (1, 1, 0)
    (nothing,) = grades(scoring, ("none", row("None")))
    assert (nothing.score, nothing.sums) == (1.0, (0, 0, 0))


def test_token_f1_by_hand():
    scoring = Scoring(metric="token_f1")
    found = grades(scoring, ("The red, red hat", row("red hat")), ("", row("hat")))
    assert [grade.score for grade in found] == [pytest.approx(2 * 2 / (4 + 2)), 0.0]
    assert total(scoring, found) == pytest.approx(1 / 3)


def test_rouge_l_by_hand():
    """The example of Lin 2004, section 3.1: three words of four in order, then two."""
    scoring = Scoring(metric="rouge_l")
    target = row("police killed the gunman")
    found = grades(scoring, ("Police kill the gunman!", target), ("the gunman kill police", target))
    assert [grade.score for grade in found] == [3 / 4, 2 / 4]
    (chinese,) = grades(scoring, ("红色连衣裙", row("红连衣裙")))
    assert chinese.score == pytest.approx(2 * 4 / 9), "a character is a word"


def test_ndcg_by_hand():
    """Relevances 3, 0, 1 of items 1, 2, 3; the ranking 3, 1, 2."""
    scoring = Scoring(metric="ndcg", reference="relevance")
    target = row("1,3,2", relevance=[3, 0, 1])
    gained = 1 / math.log2(2) + 7 / math.log2(3)
    best = 7 / math.log2(2) + 1 / math.log2(3)
    found = grades(scoring, ("3,1,2", target), ("3, 3, 3, 1", target), ("C,A,B", target))
    assert found[0].score == pytest.approx(gained / best)
    assert found[1].score == pytest.approx(gained / best), "a repeated item is one item"
    assert found[2].score == found[0].score
    cut = Scoring(metric="ndcg", reference="relevance", k=1)
    assert grades(cut, ("3,1,2", target))[0].score == pytest.approx(1 / 7)
    bad = grades(scoring, ("I cannot rank these", target), ("99,1", target))
    assert bad[0].score == 0
    assert bad[1].score == pytest.approx(7 / math.log2(3) / best), "an unknown item takes a place"
    assert not grades(scoring, ("no idea", target))[0].valid


def test_hit_and_recall_by_hand():
    target = row("2,5,7")
    for metric, expected in (("hit", [1, 0, 0]), ("recall", [2 / 3, 0, 0])):
        scoring = Scoring(metric=metric, k=3)
        found = grades(scoring, ("7, 1, 2, 5", target), ("1,3,4,5", target), ("none", target))
        assert [grade.score for grade in found] == pytest.approx(expected)
        assert [grade.valid for grade in found] == [True, True, False]
    field = Scoring(metric="recall", reference="bought")
    assert grades(field, ("b", row("see the field", bought=["B"])))[0].score == 1


@pytest.mark.parametrize(
    ("scoring", "bad", "message"),
    [
        (BINARY, row("perhaps"), "none of the labels"),
        (Scoring(metric="attribute_f1"), row("red"), "names no attribute"),
        (Scoring(metric="ndcg", reference="gain"), row("1"), "no relevances in the field 'gain'"),
        (Scoring(metric="hit"), row("nothing"), "which items are relevant"),
    ],
    ids=lambda value: value.metric if isinstance(value, Scoring) else None,
)
def test_rows_that_no_answer_could_be_right_to_are_refused(scoring, bad, message):
    with pytest.raises(InputError, match=rf"d\.jsonl:7.*{message}"):
        check_rows(scoring, [bad])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"extract": "("}, "no regular expression"),
        ({"metric": "macro_f1"}, "needs labels"),
        ({"metric": "binary_f1", "labels": ["a", "b"], "positive": "c"}, "needs positive"),
        ({"metric": "binary_f1", "labels": ["a"], "positive": "a"}, "two labels"),
        ({"metric": "ndcg"}, "needs reference"),
        ({"metric": "hit", "k": 0}, "k must be at least 1"),
        ({"k": 3}, "k means nothing to metric exact_match"),
        ({"metric": "choice", "extract": "x"}, "extract means nothing to metric choice"),
        ({"metric": "rouge_l", "labels": ["a"]}, "labels means nothing"),
        ({"metric": "lm_eval"}, "go together"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        Scoring(**settings)
