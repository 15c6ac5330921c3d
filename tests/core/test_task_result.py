"""One result type: what results.json holds, what is read of it, when a difference is noise."""

import json
import subprocess
import sys

import pytest

from dominie.core.task_result import Interval, TaskResult, within_noise


def test_a_result_is_written_as_results_json_has_it_and_read_back():
    group = TaskResult(1.0, 0.0, 1, interval=Interval(1.0, 0.025, 1.0))
    result = TaskResult(
        0.5,
        0.1,
        4,
        "exact_match",
        by={"a": group},
        extras={"invalid": 0.25},
        interval=Interval(0.5, 0.3, 0.7),
        measure="exact match",
    )
    record = {
        "score": 0.5,
        "stderr": 0.1,
        "n": 4,
        "interval": [0.3, 0.7],
        "invalid": 0.25,
        "groups": {"a": {"score": 1.0, "stderr": 0.0, "n": 1, "interval": [0.025, 1.0]}},
        "metric": "exact_match",
        "measure": "exact match",
    }
    assert result.as_dict() == record
    assert list(result.as_dict()) == list(record), "in this order"
    assert TaskResult.from_dict(json.loads(json.dumps(record))) == result
    assert result.invalid == 0.25
    assert group.invalid == 0.0


def test_how_far_a_model_moved_is_read_off_its_score():
    record = {"score": 0.5, "interval": [0.25, 0.8], "kl": 0.7, "metric": "forgetting"}
    found = TaskResult.from_dict({**record, "kl_interval": [0.2, 1.4]})
    assert found.extras == {"kl": 0.7}
    assert (found.kl.estimate, *found.kl.ends) == pytest.approx((0.7, 0.2231, 1.3863), abs=1e-4)
    assert found.as_dict()["kl_interval"] == list(found.kl.ends)
    for other in ({"metric": "agreement"}, {"kl": None}):
        assert TaskResult.from_dict({**record, **other}).kl is None
    itself = TaskResult.from_dict({**record, "score": 1.0, "interval": [0.6, 1.0], "kl": 0.0})
    assert itself.kl.ends == (0.0, 0.0), "nothing to estimate"
    lost = TaskResult.from_dict({**record, "score": 0.0, "interval": [0.0, 0.1], "kl": 900.0})
    assert lost.kl.ends[1] == 900.0


def test_what_a_judge_found_is_kept_on_paper_and_read_for_a_table():
    controls = {"empty": {"score": 0.1, "n": 3}, "length_only": {"correlation": 0.2}}
    written = TaskResult(
        0.5,
        metric="alpaca_eval",
        extras={"win_rate": 0.5, "length_controlled_win_rate": 0.4},
        controls=controls,
        warnings=("the judge is kin",),
    ).as_dict()
    assert written["controls"] == controls
    read = TaskResult.from_dict(written)
    assert read.extras == {"length_controlled_win_rate": 0.4}, "many figures are no columns"
    assert read.controls == {"empty": 0.1}
    assert read.warnings == ("the judge is kin",)


@pytest.mark.parametrize("record", [None, 3, [], {}, {"score": "1"}, {"score": float("nan")}])
def test_without_a_finite_score_there_is_no_result(record):
    assert TaskResult.from_dict(record) is None


def test_fields_of_another_type_are_left_out():
    odd = {"score": 1, "stderr": "x", "n": True, "metric": 3, "groups": {"a": 1, "b": {"score": 0}}}
    odd |= {"interval": [0.7, 0.3], "measure": [], "controls": [1], "warnings": [1, "w"], "kl": 2}
    found = TaskResult.from_dict(odd)
    assert found == TaskResult(1.0, by={"b": TaskResult(0.0)}, extras={"kl": 2.0}, warnings=("w",))


def test_the_interval_is_as_measured_else_normal_else_by_the_rule_of_three():
    assert TaskResult(1.0, 0.0, 300).ends == (pytest.approx(0.99), 1.0)
    assert TaskResult(0.0, 0.0, 2).ends == (0.0, 1.0)
    assert TaskResult(0.5, 0.02, 300).ends == pytest.approx((0.4608, 0.5392), abs=1e-4)
    assert TaskResult(0.5).ends is None
    measured = Interval(0.5, 0.3, 0.6)
    assert TaskResult(0.5, 0.02, 300, interval=measured).interval95 is measured


def test_the_paired_difference_decides_else_the_intervals():
    near, far = TaskResult(0.57, 0.02), TaskResult(0.60, 0.02)
    base = TaskResult(0.50, 0.02)
    assert within_noise(base, near)
    assert within_noise(base, far) is False
    assert within_noise(base, TaskResult(0.57)) is None
    assert within_noise(base, near, Interval(0.07, 0.01, 0.13)) is False
    assert within_noise(base, far, Interval(0.1, -0.01, 0.2)) is True


def test_a_difference_taken_the_other_way():
    forth = Interval(0.1, -0.05, 0.2, 0.03, 9)
    assert -forth == Interval(-0.1, -0.2, 0.05, 0.03, 9)
    assert forth.within_noise == (-forth).within_noise is True


def test_results_need_neither_torch_nor_numpy():
    script = "import sys, dominie.core.task_result; print({'torch', 'numpy'} & set(sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "set()"
