from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from run_folders import quickstart

from dominie.core.run_records import Run, Stage, read_run
from dominie.core.task_result import Interval, TaskResult
from dominie.report.formatting import THIN, plain
from dominie.report.headline import findings


def made_run(results, stages=()):
    """A run of scores {model: {task: (score, stderr)}} and stages (name, student, teachers)."""
    return Run(
        name="r",
        path=Path("r"),
        results={
            model: {task: TaskResult(*score, metric="exact_match") for task, score in tasks.items()}
            for model, tasks in results.items()
        },
        stages={
            name: Stage(name, "done", student=student, teachers=teachers)
            for name, student, teachers in stages
        },
        samples={},
        recipe=None,
        notes=(),
    )


def headline(*args):
    return plain(findings(made_run(*args)).headline).replace(THIN, " ")


LADDER = (
    ("distill", "base", {"general": "teacher"}),
    ("sft", "base", {"general": None}),
    ("expert", "distill", {"domain": None}),
    ("align", "distill", {"domain": "expert", "general": "distill"}),
)


def ladder(**changed):
    scores = {
        "base": {"general": (0.02, 0.01), "domain": (0.01, 0.01)},
        "teacher": {"general": (0.88, 0.01), "domain": (0.11, 0.01)},
        "sft": {"general": (0.64, 0.01), "domain": (0.06, 0.01)},
        "distill": {"general": (0.77, 0.01), "domain": (0.07, 0.01)},
        "expert": {"general": (0.31, 0.01), "domain": (0.83, 0.01)},
        "align": {"general": (0.76, 0.01), "domain": (0.48, 0.01)},
    }
    return scores | changed


def test_the_aligned_model_is_compared_with_the_student_it_started_from():
    assert headline(ladder(), LADDER) == (
        "align keeps 99 % of the general score of distill (within noise) "
        "and gains 41 points in domain."
    )


def test_a_loss_beyond_noise_is_not_called_noise():
    results = ladder(align={"general": (0.72, 0.002), "domain": (0.80, 0.01)})
    results["distill"]["general"] = (0.77, 0.002)
    assert headline(results, LADDER) == (
        "align keeps 94 % of the general score of distill (−5.0 points) "
        "and gains 73 points in domain."
    )


def test_a_large_loss_is_not_called_keeping():
    results = ladder(align={"general": (0.31, 0.01), "domain": (0.83, 0.01)})
    results.pop("expert")
    assert headline(results, LADDER) == (
        "align gains 76 points in domain over distill but loses 46 points in general."
    )


def test_a_model_that_gained_nothing_is_told_so():
    results = ladder(align={"general": (0.77, 0.01), "domain": (0.07, 0.01)})
    for name in ("expert", "sft", "base"):
        results.pop(name)
    assert headline(results, LADDER) == (
        "align keeps its scores in general and domain from distill (within noise)."
    )


def test_the_others_support_the_headline():
    support = [
        plain(each).replace(THIN, " ") for each in findings(made_run(ladder(), LADDER)).support
    ]
    assert support == [
        "distill reaches 88 % of the general score of its teacher teacher, "
        "13 points above sft, taught by labels alone.",
        "expert gains 76 points in domain over distill but loses 46 points in general.",
        "sft gains 62 points in general and 5.0 in domain over base.",
    ]


def test_a_student_within_noise_of_its_teacher_and_of_plain_tuning():
    results = ladder(distill={"general": (0.87, 0.02)}, sft={"general": (0.86, 0.02)})
    for name in ("expert", "align"):
        results.pop(name)
    assert headline(results, LADDER[:2]) == (
        "distill is within noise of its teacher teacher in general, "
        "within noise of sft, taught by labels alone."
    )


def test_without_stages_the_best_model_is_named_with_its_interval():
    results = {"a": {"t": (0.5, 0.01)}, "b": {"t": (0.6, 0.01)}}
    assert headline(results) == "b scores 60.0 % (58.0–62.0) in t."


def test_a_score_of_nothing_is_no_division():
    results = {"a": {"t": (0.0, 0.0)}, "b": {"t": (0.0, 0.0)}}
    assert headline(results, (("b", "a", {}),)) == "No model solves anything yet: 0 % in t."


def test_many_tasks_are_counted():
    before = {f"t{index}": (0.5, 0.01) for index in range(6)}
    after = before | {f"t{index}": (0.7 + index / 100, 0.01) for index in range(4)}
    assert headline({"a": before, "b": after}, (("b", "a", {}),)) == (
        "b keeps its scores in t4 and t5 from a (within noise) "
        "and gains in 4 tasks, most in t3 (23 points)."
    )


def test_a_difference_on_the_same_questions_decides():
    """Intervals overlap; the paired one does not hold 0."""
    results = {"a": {"t": (0.50, 0.02)}, "b": {"t": (0.54, 0.02)}}
    assert "within noise" in headline(results, (("b", "a", {}),))
    run = replace(
        made_run(results, (("b", "a", {}),)),
        differences={"t": {("a", "b"): Interval(-0.04, -0.06, -0.02)}},
    )
    assert plain(findings(run).headline) == "b gains 4.0 points in t over a."
    unsure = {"t": {("b", "a"): Interval(0.30, -0.01, 0.61)}}
    run = replace(made_run({"a": {"t": (0.2, 0.01)}, "b": {"t": (0.5, 0.01)}}), differences=unsure)
    assert run.within_noise("t", "a", "b")


def test_ratings_differ_in_points_of_10():
    run = made_run({"a": {"t": (0.6, 0.01)}, "b": {"t": (0.655, 0.01)}}, (("b", "a", {}),))
    for name in run.results:
        run.results[name]["t"] = replace(run.results[name]["t"], metric="mt_bench")
    assert plain(findings(run).headline) == "b gains 0.55 points in t over a."
    alone = replace(run, stages={}, results={"b": run.results["b"]})
    assert plain(findings(alone).headline) == "b scores 6.55 (6.35–6.75) in t."


def test_if_nothing_is_solved_the_headline_is_about_agreement():
    stages = (("distill", "base", {"s": "teacher"}), ("align", "distill", {"s": "distill"}))
    run = made_run({name: {"answers": (0.0, 0.0)} for name in ("base", "distill", "align")}, stages)
    for name, agreed, kl in (("base", 0.05, 5.2), ("distill", 0.40, 2.31), ("align", 0.41, 2.3)):
        run.results[name]["general"] = TaskResult(
            agreed, 0.01, 400, "agreement", extras={"kl": kl, "loss": 4.0}
        )
    found = findings(run)
    assert plain(found.headline).replace(THIN, " ") == (
        "align agrees with the teacher on 41.0 % of the tokens of general "
        "(KL 2.30 nats, within noise of distill)."
    )
    assert [plain(each) for each in found.support] == ["No model solved anything in answers yet."]
    run.results["base"]["answers"] = TaskResult(0.1, 0.02, 40, "exact_match")
    assert "agrees" not in plain(findings(run).headline)


def test_a_run_of_agreement_alone_has_a_headline():
    run = made_run({"a": {}, "b": {}})
    run.results["a"]["like"] = TaskResult(0.7, 0.01, 50, "agreement")
    assert plain(findings(run).headline).replace(THIN, " ") == (
        "a agrees with the teacher on 70.0 % of the tokens of like."
    )


def test_agreement_is_no_ability():
    run = made_run({"a": {"t": (0.5, 0.01)}, "b": {"t": (0.4, 0.01)}})
    run.results["b"]["like"] = TaskResult(1.0, metric="agreement")
    assert run.ability_tasks == ("t",)
    assert findings(run).model == "a"


def test_open_stages_are_named_before_there_are_results():
    run = made_run({}, LADDER)
    run.stages["align"] = Stage("align")
    assert plain(findings(run).headline) == "3 of 4 stages done, align still open."
    assert plain(findings(made_run({})).headline) == ("Nothing has been trained or evaluated yet.")


def test_the_quickstart_is_about_align(tmp_path):
    found = findings(read_run(quickstart(tmp_path)))
    assert found.model == "align"
    assert "distill" in plain(found.headline)


_NAMES = st.sampled_from(["a", "b", "c", "d"])
_SCORES = st.tuples(st.floats(0, 1), st.none() | st.floats(0, 0.5))
_RESULTS = st.dictionaries(
    _NAMES, st.dictionaries(st.sampled_from("tuvwx"), _SCORES, min_size=1), max_size=4
)
_MAYBE = st.none() | _NAMES
_STAGES = st.lists(
    st.tuples(_NAMES, _MAYBE, st.dictionaries(st.sampled_from("st"), _MAYBE)), max_size=4
)


@given(_RESULTS, _STAGES)
def test_whatever_the_results_the_sentences_are_sentences_about_them(results, stages):
    run = made_run(results, stages)
    found = findings(run)
    for sentence in (found.headline, *found.support):
        text = plain(sentence)
        assert text.endswith(".")
        assert "  " not in text
        assert "nan" not in text
        for part in sentence:
            if part.kind == "model":
                assert part.text in run.results
            if part.kind == "task":
                assert part.text in run.tasks


@given(st.floats(0, 1), st.floats(0, 1), st.floats(0, 0.2), st.floats(0, 0.2))
def test_a_gain_is_claimed_only_where_intervals_are_apart(before, after, one, other):
    results = {"a": {"t": (before, one)}, "b": {"t": (after, other)}}
    text = headline(results, (("b", "a", {}),))
    apart = abs(after - before) > 1.959964 * (one + other)
    assert ("gains " in text) == (apart and after > before)
    assert ("loses" in text or "−" in text) == (apart and after < before)


@pytest.mark.parametrize("share", [0.9961, 0.99999])
def test_no_loss_is_rounded_away(share):
    results = {"a": {"t": (0.9, 0.02)}, "b": {"t": (0.9 * share, 0.02)}}
    assert "keeps 99 %" in headline(results, (("b", "a", {}),))


def test_a_pretrained_student_that_is_its_own_reference_is_what_dae_is_compared_with():
    results = {
        "original": {"hellaswag": (0.35, 0.03), "entities": (0.0, 0.01)},
        "expert": {"hellaswag": (0.34, 0.03), "entities": (0.47, 0.04)},
        "align": {"hellaswag": (0.36, 0.03), "entities": (0.42, 0.04)},
    }
    stages = (
        ("expert", "original", {"domain": None}),
        ("align", "original", {"domain": "expert", "general": "original"}),
    )
    assert headline(results, stages) == (
        "align keeps all of the hellaswag score of original (within noise) "
        "and gains 42 points in entities."
    )
    taught = (stages[0], ("align", "original", {"domain": "expert"}))
    assert "reaches" in headline(results, taught) or "is within noise of its teacher" in headline(
        results, taught
    ), "a start that teaches nothing is not what a student of another teacher is measured by"
