"""Every metric against numbers worked out by hand."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from dominie.core.errors import InputError
from dominie.data.conversations import Conversation
from dominie.evaluation.metrics import METRICS, check_rows, may_be_invalid, score_answer
from dominie.evaluation.score_items import SampleScore
from dominie.evaluation.statistics import STATISTICS
from dominie.evaluation.task import MetricSettings


def row(target: str, **fields: Any) -> Conversation:
    messages = [{"role": "user", "content": "?"}, {"role": "assistant", "content": target}]
    return Conversation(messages, where="d.jsonl:7", fields=fields)


def scores(task: MetricSettings, *answers: tuple[str | None, Conversation]) -> list[SampleScore]:
    return [score_answer(task, answer, each) for answer, each in answers]


def total(task: MetricSettings, found: list[SampleScore]) -> float:
    sums = np.array([one.sums for one in found], dtype=float).sum(0)
    return float(STATISTICS[METRICS[task.metric].statistic](sums))


def test_exact_match_ignores_white_space_and_what_it_is_told_to():
    strict = MetricSettings()
    found = scores(strict, (" red  hat\n", row("red hat")), ("Red hat.", row("red hat")))
    assert [one.score for one in found] == [1.0, 0.0]
    assert total(strict, found) == 0.5
    assert not may_be_invalid(strict)
    lenient = MetricSettings(ignore=["case", "punctuation", "articles"])
    found = scores(lenient, ("The Red hat.", row("a red hat")), ("theatre", row("atre")))
    assert [one.score for one in found] == [1.0, 0.0]


def test_what_is_extracted_is_compared():
    """As in GSM8K: the number after the four hashes, in target and output."""
    task = MetricSettings(extract=r"####\s*(-?[\d,]+)")
    target = row("2 + 2 = 4, twice is 8.\n#### 8")
    found = scores(task, ("8", target), (None, target), ("9", target))
    assert [one.score for one in found] == [1.0, 0.0, 0.0]
    assert [one.valid for one in found] == [True, False, True]
    assert may_be_invalid(task)


BINARY = MetricSettings(metric="binary_f1", labels=["no", "yes"], positive="yes")


def test_binary_f1_by_hand():
    """TP 2, FP 1, FN 1: 2·2 / (4 + 1 + 1)."""
    yes, no = row("yes"), row("no")
    found = scores(BINARY, ("Yes.", yes), (" yes", yes), ("no", yes), ("yes", no), ("NO", no))
    assert total(BINARY, found) == pytest.approx(4 / 6)
    assert [one.score for one in found] == [1, 1, 0, 0, 1]
    assert all(one.valid for one in found)


def test_an_answer_that_is_no_label_is_a_wrong_one():
    yes, no = row("yes"), row("no")
    found = scores(BINARY, ("yes", yes), ("maybe", yes), ("yes or no", no), (None, no))
    assert [one.valid for one in found] == [True, False, False, False]
    assert total(BINARY, found) == pytest.approx(2 / (2 + 2 + 1)), "TP 1, FP 2, FN 1"


def test_macro_f1_by_hand():
    """Of A: TP 1 FP 1 FN 1, F1 1/2; of B: TP 1 FP 1 FN 0, 2/3; of C: FN 1, 0; D is nowhere."""
    task = MetricSettings(metric="macro_f1", labels=["A", "B", "C", "D"], extract=r"^\s*([A-D])\b")
    answers = [("A", "A"), ("B", "A"), ("B", "B: fair"), ("A", "C"), ("D?", "C")]
    pairs = [(answer, row(target)) for answer, target in answers[:4]]
    found = scores(task, *pairs)
    assert total(task, found) == pytest.approx((1 / 2 + 2 / 3 + 0) / 3)
    found = scores(task, *pairs, ("nothing", row("A")))
    assert not found[-1].valid
    assert total(task, found) == pytest.approx((2 / 5 + 2 / 3 + 0) / 3), "FN of A"


def test_attribute_f1_by_hand():
    """Two of three found, one wrong value: TP 2, FP 1, FN 1."""
    task = MetricSettings(metric="attribute_f1")
    target = row('[{"attribute": "color", "value": "red"}, {"attribute": "size", "value": "M"}]')
    other = row('[{"attribute": "brand", "value": "Ada"}]')
    found = scores(
        task,
        ('[{"attribute": "Color", "value": "Red"}, {"attribute": "size", "value": "L"}]', target),
        ("brand: ada", other),
    )
    assert total(task, found) == pytest.approx(4 / 6)
    assert found[0].score == pytest.approx(1 / 2)
    assert all(one.valid for one in found)
    (bad,) = scores(task, ("it is red", target))
    assert (bad.valid, bad.sums) == (False, (0, 0, 2))


def test_a_source_counts_where_the_target_names_it():
    """As in ECInstruct's attribute value extraction."""
    task = MetricSettings(metric="attribute_f1")
    target = row('[{"attribute": "color", "value": "red", "source": "title"}]')
    right = '[{"attribute": "color", "value": "red", "source": "title"}]'
    wrong = right.replace("title", "price")
    assert [one.score for one in scores(task, (right, target), (wrong, target))] == [1, 0]
    plain = row("color: red")
    assert scores(task, (right, plain))[0].score == 1


def test_span_f1_by_hand():
    """TP 2, FP 2, FN 1."""
    task = MetricSettings(metric="span_f1")
    target = row("Pentium 4 processor, Toshiba, Webcam")
    (one,) = scores(task, ("toshiba, webcam, DVD, USB", target))
    assert one.sums == (2, 2, 1)
    assert total(task, [one]) == pytest.approx(4 / 7)
    (listed,) = scores(task, ('["Toshiba", "Webcam"]', row('["toshiba"]')))
    assert listed.sums == (1, 1, 0)
    (nothing,) = scores(task, ("none", row("None")))
    assert (nothing.score, nothing.sums) == (1.0, (0, 0, 0))


def test_token_f1_by_hand():
    task = MetricSettings(metric="token_f1")
    found = scores(task, ("The red, red hat", row("red hat")), ("", row("hat")))
    assert [one.score for one in found] == [pytest.approx(2 * 2 / (4 + 2)), 0.0]
    assert total(task, found) == pytest.approx(1 / 3)


def test_rouge_l_by_hand():
    """The example of Lin 2004, section 3.1: three words of four in order, then two."""
    task = MetricSettings(metric="rouge_l")
    target = row("police killed the gunman")
    found = scores(task, ("Police kill the gunman!", target), ("the gunman kill police", target))
    assert [one.score for one in found] == [3 / 4, 2 / 4]
    (chinese,) = scores(task, ("红色连衣裙", row("红连衣裙")))
    assert chinese.score == pytest.approx(2 * 4 / 9), "a character is a word"


def test_ndcg_by_hand():
    """Relevances 3, 0, 1 of items 1, 2, 3; the ranking 3, 1, 2."""
    task = MetricSettings(metric="ndcg", reference="relevance")
    target = row("1,3,2", relevance=[3, 0, 1])
    gained = 1 / math.log2(2) + 7 / math.log2(3)
    best = 7 / math.log2(2) + 1 / math.log2(3)
    found = scores(task, ("3,1,2", target), ("3, 3, 3, 1", target), ("C,A,B", target))
    assert found[0].score == pytest.approx(gained / best)
    assert found[1].score == pytest.approx(gained / best), "a repeated item is one item"
    assert found[2].score == found[0].score
    cut = MetricSettings(metric="ndcg", reference="relevance", k=1)
    assert scores(cut, ("3,1,2", target))[0].score == pytest.approx(1 / 7)
    bad = scores(task, ("I cannot rank these", target), ("99,1", target))
    assert bad[0].score == 0
    assert bad[1].score == pytest.approx(7 / math.log2(3) / best), "an unknown item takes a place"
    assert not scores(task, ("no idea", target))[0].valid


def test_hit_and_recall_by_hand():
    target = row("2,5,7")
    for metric, expected in (("hit", [1, 0, 0]), ("recall", [2 / 3, 0, 0])):
        task = MetricSettings(metric=metric, k=3)
        found = scores(task, ("7, 1, 2, 5", target), ("1,3,4,5", target), ("none", target))
        assert [one.score for one in found] == pytest.approx(expected)
        assert [one.valid for one in found] == [True, True, False]
    field = MetricSettings(metric="recall", reference="bought")
    assert scores(field, ("b", row("see the field", bought=["B"])))[0].score == 1


@pytest.mark.parametrize(
    ("task", "bad", "message"),
    [
        (BINARY, row("perhaps"), "none of the labels"),
        (MetricSettings(metric="attribute_f1"), row("red"), "names no attribute"),
        (
            MetricSettings(metric="ndcg", reference="gain"),
            row("1"),
            "no relevances in the field 'gain'",
        ),
        (MetricSettings(metric="hit"), row("nothing"), "does not name the relevant items"),
    ],
    ids=lambda value: value.metric if isinstance(value, MetricSettings) else None,
)
def test_rows_that_no_answer_could_be_right_to_are_refused(task, bad, message):
    with pytest.raises(InputError, match=rf"d\.jsonl:7.*{message}"):
        check_rows(task, [bad])


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
        MetricSettings(**settings)
