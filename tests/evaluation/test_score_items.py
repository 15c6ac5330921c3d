"""Models compared on the same questions."""

from __future__ import annotations

import numpy as np

from dominie.evaluation.score_items import Items, SampleScore, compare_models, score_items
from dominie.evaluation.statistics import paired_differences


def items(values: list[float], clusters: list[int] | None = None) -> Items:
    sums = [SampleScore.of_mean(value).sums for value in values]
    return Items("ratio", clusters or list(range(len(values))), sums)


def test_pairs_of_models_are_told_apart_where_they_can_be():
    rng = np.random.default_rng(0)
    hard = rng.random(200)
    levels = {"base": 0.5, "alike": 0.5, "better": 0.7}
    answers = {n: (hard + rng.normal(0, 0.05, 200) < x).astype(float) for n, x in levels.items()}
    found = compare_models({name: items(values.tolist()) for name, values in answers.items()})
    assert found.keys() == {"base", "alike"}
    low, high = found["base"]["alike"]["interval"]
    assert low < 0 < high
    assert found["base"]["better"]["interval"][1] < 0
    assert found["alike"]["better"]["interval"][1] < 0
    expected = paired_differences(answers)["base", "better"]
    assert found["base"]["better"]["difference"] == expected.estimate
    assert found["base"]["better"]["interval"] == [expected.low, expected.high]
    other_way = compare_models({name: items(answers[name].tolist()) for name in ("better", "base")})
    assert other_way["better"]["base"]["interval"][0] > 0


def test_models_asked_other_questions_are_not_compare_models():
    assert compare_models({"a": items([1.0, 0.0]), "b": items([1.0, 0.0, 1.0])}) == {}
    assert compare_models({"a": items([1.0, 0.0]), "b": items([1.0, 0.0], [0, 0])}) == {}
    assert compare_models({"a": items([1.0, 0.0])}) == {}


def test_a_score_keeps_what_it_was_computed_from():
    scored = score_items(
        [(1, 2), (3, 4), (0, 2)], "ratio", questions=["a", "b", "a"], groups=["x", "y", None]
    )
    score = scored.result
    assert score.score == 0.5
    assert score.n == 3
    assert score.interval.low < 0.5 <= score.interval.high
    assert score.by["x"].n == 1
    assert score.by["y"].score == 0.75
    assert scored.items.as_dict() == {
        "statistic": "ratio",
        "clusters": [0, 1, 0],
        "sums": [[1, 2], [3, 4], [0, 2]],
    }
    assert score.as_dict()["interval"] == list(score.interval.ends)
