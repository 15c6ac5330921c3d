"""Models compared on the same questions."""

from __future__ import annotations

import numpy as np

from dominie.evaluation.results import Items, compared, mean_grade, scored
from dominie.evaluation.statistics import paired_difference


def items(values: list[float], clusters: list[int] | None = None) -> Items:
    sums = [mean_grade(value).sums for value in values]
    return Items("ratio", clusters or list(range(len(values))), sums)


def test_pairs_of_models_are_told_apart_where_they_can_be():
    rng = np.random.default_rng(0)
    hard = rng.random(200)
    levels = {"base": 0.5, "alike": 0.5, "better": 0.7}
    answers = {n: (hard + rng.normal(0, 0.05, 200) < x).astype(float) for n, x in levels.items()}
    found = compared({name: items(values.tolist()) for name, values in answers.items()})
    assert found.keys() == {"base", "alike"}
    assert found["base"]["alike"]["verdict"] == "within noise"
    assert found["base"]["better"]["verdict"] == "worse"
    assert found["alike"]["better"]["verdict"] == "worse"
    expected = paired_difference(answers["base"], answers["better"])
    assert found["base"]["better"]["difference"] == expected.estimate
    assert found["base"]["better"]["interval"] == [expected.low, expected.high]
    other_way = compared({name: items(answers[name].tolist()) for name in ("better", "base")})
    assert other_way["better"]["base"]["verdict"] == "better"


def test_models_asked_other_questions_are_not_compared():
    assert compared({"a": items([1.0, 0.0]), "b": items([1.0, 0.0, 1.0])}) == {}
    assert compared({"a": items([1.0, 0.0]), "b": items([1.0, 0.0], [0, 0])}) == {}
    assert compared({"a": items([1.0, 0.0])}) == {}


def test_a_score_keeps_what_it_was_computed_from():
    score = scored(
        [(1, 2), (3, 4), (0, 2)], "ratio", questions=["a", "b", "a"], groups=["x", "y", None]
    )
    assert score.score == 0.5
    assert score.n == 3
    assert score.interval[0] < 0.5 <= score.interval[1]
    assert score.groups["x"].n == 1
    assert score.groups["y"].score == 0.75
    assert score.items is not None
    assert score.items.as_dict() == {
        "statistic": "ratio",
        "clusters": [0, 1, 0],
        "sums": [[1, 2], [3, 4], [0, 2]],
    }
    assert score.as_dict()["interval"] == list(score.interval)
