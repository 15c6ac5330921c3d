"""MT-Bench: upstream's files in, upstream's files out, and what the verdicts come to."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from dominie.core.errors import InputError
from dominie.evaluation.statistics import spearman
from dominie.judge.judge import Judge, Verdict
from dominie.judge.mt_bench import MtBench

UPSTREAM = Path(__file__).parents[3] / "shared" / "data" / "mt_bench"
JUDGE = Judge(endpoint="http://127.0.0.1:9/v1", model="j")
QUESTIONS = [
    {"question_id": 1, "category": "writing", "turns": ["Write.", "Again."]},
    {"question_id": 2, "category": "math", "turns": ["1+1?", "2+2?"]},
    {"question_id": 3, "category": "math", "turns": ["3+3?"]},
]
REFERENCES = [
    {"question_id": i, "model_id": "anyone", "choices": [{"index": 0, "turns": ["two", "four"]}]}
    for i in (2, 3)
]


def write(path: Path, rows) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def settings(tmp_path):
    def make(questions=QUESTIONS, references=REFERENCES, **more):
        files = {"questions": write(tmp_path / "question.jsonl", questions)}
        if references is not None:
            files["references"] = write(tmp_path / "ref.jsonl", references)
        return MtBench(judge=JUDGE, **{**files, **more})

    return make


ANSWERS = {1: ["one", "one again"], 2: ["1+1=2", "2+2=4"], 3: ["6"]}


def rated(*values):
    return [Verdict(value, f"Grade: {value}", 1) for value in values]


def test_turns_references_and_prompts_go_together(settings):
    cases = settings().load().cases(ANSWERS)
    assert [case.quoted for case in cases] == [
        ("one",),
        ("one", "one again"),
        ("1+1=2",),
        ("1+1=2", "2+2=4"),
        ("6",),
    ]
    texts = ["\n".join(m["content"] for m in case.messages) for case in cases]
    assert "Again." not in texts[0]
    assert all(part in texts[1] for part in ("Write.", "one\n", "Again.", "one again"))
    assert "two" in texts[2]
    assert "four" not in texts[2]
    assert "two" in texts[3]
    assert "four" in texts[3]
    assert not any("{" in text for text in texts)


def test_means_by_category_and_turn(settings):
    judged = settings().load().judged(ANSWERS, rated(8.0, 6.0, 4.0, None, 1.0), "m")
    assert (judged.scored, judged.total) == (4, 5)
    figures = judged.figures
    assert figures["metric"] == "mt_bench"
    assert figures["rating"] == pytest.approx((8 + 6 + 4 + 1) / 4)  # the unscored is no 0
    assert figures["score"] == pytest.approx(figures["rating"] / 10)
    assert figures["n"] == 3
    low, high = figures["interval"]
    assert 0 <= low <= figures["score"] <= high <= 1
    assert figures["groups"]["writing"]["score"] == pytest.approx(0.7)
    assert figures["groups"]["math"]["score"] == pytest.approx(0.25)
    assert figures["turns"] == {"1": pytest.approx(13 / 3), "2": 6.0}
    lines = judged.files["judgments.jsonl"]
    assert [(x["question_id"], x["turn"], x["score"]) for x in lines] == [
        (1, 1, 8.0), (1, 2, 6.0), (2, 1, 4.0), (2, 2, -1), (3, 1, 1.0)
    ]  # fmt: skip
    assert judged.rows[1]["target"] == "two\n\nfour"
    assert judged.rows[1]["ratings"] == [4.0, None]


def test_a_comparison_that_flips_with_the_order_is_a_tie(settings, tmp_path):
    theirs = [{"question_id": i, "choices": [{"turns": [f"b{i}", f"bb{i}"]}]} for i in (1, 2, 3)]
    benchmark = settings(baseline=write(tmp_path / "b.jsonl", theirs)).load()
    cases = benchmark.cases(ANSWERS)
    assert len(cases) == 5 + 2 * 5
    first, second = cases[5], cases[6]
    assert first.quoted == ("one", "b1")
    assert second.quoted == ("b1", "one")
    letters = ["A", "B", "A", "A", "B", "A", "C", "C", "A", None]  # won, flipped, lost, tied, -
    figures = benchmark.judged(
        ANSWERS, [*rated(5.0, 5.0, 5.0, 5.0, 5.0), *rated(*letters)], "m"
    ).figures
    assert figures["win_rate"] == pytest.approx((1 + 0.5 + 0 + 0.5) / 4)
    assert figures["order_flips"] == 0.25
    by_category = {name: group["score"] for name, group in figures["win_rate_groups"].items()}
    assert by_category == {"writing": 0.75, "math": 0.25}


@pytest.mark.skipif(not UPSTREAM.exists(), reason="upstream's files are not here")
def test_upstreams_own_files():
    settings = MtBench(
        judge=JUDGE,
        questions=str(UPSTREAM / "question.jsonl"),
        references=str(UPSTREAM / "reference_answer"),
        prompts=str(UPSTREAM / "judge_prompts.jsonl"),
        baseline=None,
    )
    benchmark = settings.load()
    assert len(benchmark.dialogues) == 80
    by_temperature = {d.temperature for d in benchmark.dialogues}
    assert by_temperature == {0.0, 0.1, 0.7}
    cases = benchmark.cases({d.id: ["first answer", "second answer"] for d in benchmark.dialogues})
    assert len(cases) == 160
    assert {case.prompt.name for case in cases} == {
        "single-v1",
        "single-v1-multi-turn",
        "single-math-v1",
        "single-math-v1-multi-turn",
    }
    for case in cases:
        text = case.messages[-1]["content"]
        assert text.count("first answer") == 1
        assert "{question" not in text
        assert "{ref_answer" not in text
        assert "{answer" not in text
    assert len(benchmark.control_dialogues) == 40
    category = {question.id: question.category for question in benchmark.questions}
    assert len({category[d.id] for d in benchmark.control_dialogues}) == 8


@pytest.mark.parametrize(
    ("questions", "references", "words"),
    [
        ([*QUESTIONS, QUESTIONS[0]], REFERENCES, r"question 1 occurs twice"),
        (QUESTIONS, None, "no reference answers"),
        (QUESTIONS, REFERENCES[:1], "question 3 has none of the reference answers"),
        (QUESTIONS, [{**REFERENCES[0], "choices": []}], "no answers"),
        (QUESTIONS, [{**r, "choices": [{"turns": ["x"]}]} for r in REFERENCES], "fewer"),
        ([{"question_id": 1, "category": "a", "turns": []}], None, "one or two texts"),
        ([{"question_id": 1, "category": "a", "turns": ["x"] * 3}], None, "one or two texts"),
        ([{"question_id": None, "category": "a", "turns": ["x"]}], None, "no question_id"),
        ([{"question_id": 1, "turns": ["x"]}], None, "category"),
        ([], None, "empty"),
    ],
)
def test_bad_files_are_refused(settings, questions, references, words):
    with pytest.raises(InputError, match=words):
        settings(questions, references).load()


def test_bad_prompts_and_folders_are_refused(settings, tmp_path):
    prompts = write(tmp_path / "p.jsonl", [{"name": "single-v1", "prompt_template": "{question}"}])
    with pytest.raises(InputError, match="system_prompt"):
        settings(prompts=prompts).load()
    row = {"name": "single-v1", "prompt_template": "{question}", "system_prompt": "s"}
    with pytest.raises(InputError, match=r"lacks \{answer\}"):
        settings(prompts=write(tmp_path / "p.jsonl", [row])).load()
    with pytest.raises(InputError, match="no prompt named 'single-v1'"):
        settings(prompts=write(tmp_path / "p.jsonl", [{**row, "name": "x"}])).load()
    (tmp_path / "folder").mkdir()
    with pytest.raises(InputError, match="no reference answers in this folder"):
        dataclasses.replace(settings(), references=str(tmp_path / "folder")).load()
    with pytest.raises(InputError, match="no such file of questions"):
        MtBench(judge=JUDGE, questions=str(tmp_path / "none.jsonl")).load()


def test_categories_are_known_however_they_are_written(settings):
    spellings = ["Math", "REASONING ", "Coding", "arena-hard-200", "Arena-Hard-v2.0"]
    questions = [
        {"question_id": i, "category": category, "turns": ["What?"]}
        for i, category in enumerate(spellings)
    ]
    answered = [{"question_id": i, "choices": [{"turns": ["42"]}]} for i in range(len(spellings))]
    loaded = settings(questions=questions, references=answered).load()
    assert [question.reference for question in loaded.questions] == [("42",)] * len(spellings)
    assert [dialogue.temperature for dialogue in loaded.dialogues] == [0.0, 0.0, 0.0, 0.0, 0.7]
    cases = loaded.cases({i: ["an answer"] for i in range(len(spellings))})
    assert all("42" in case.messages[-1]["content"] for case in cases)
    (note,) = loaded.notes
    assert note.startswith("Arena-Hard-v2.0: upstream names no temperature")


@pytest.mark.parametrize("category", ["数学", "maths", "Schreiben"])
def test_references_that_are_not_used_are_told(settings, category):
    questions = [{"question_id": 2, "category": category, "turns": ["1+1?"]}, QUESTIONS[2]]
    loaded = settings(questions=questions).load()
    unused, temperature = loaded.notes
    assert f"1 references are not used, those of {category}" in unused
    assert temperature.startswith(f"{category}: upstream names no temperature")
    assert settings().load().notes == []
    elsewhere = [{**REFERENCES[0], "question_id": 77}]
    loaded = settings(questions=QUESTIONS[:1], references=elsewhere).load()
    assert loaded.notes == ["none of the 1 references is of a question here"]


@pytest.mark.parametrize("failed", ["$ERROR$", "", "  \n"])
def test_failed_calls_among_given_answers_are_told(settings, tmp_path, failed):
    rows = [
        {"question_id": i, "choices": [{"turns": turns}]}
        for i, turns in ((1, ["fine", failed]), (2, ["two", "four"]), (3, ["six"]))
    ]
    baseline = write(tmp_path / "baseline.jsonl", rows)
    (note,) = settings(baseline=baseline).load().notes
    assert note.startswith("1 of 3 baseline answers are empty or the mark of a failed call")
    assert "'question 1' the first" in note
    broken = [REFERENCES[0], {**REFERENCES[1], "choices": [{"turns": [failed]}]}]
    with pytest.raises(InputError, match=r"(?s)references that are no answers.*question 3"):
        settings(references=broken).load()


def test_rank_correlation():
    assert spearman([1, 2, 3], [10, 100, 1000]) == pytest.approx(1.0)
    assert spearman([1, 2, 3, 4], [4, 3, 2, 1]) == pytest.approx(-1.0)
    assert spearman([1, 1, 2], [3, 3, 9]) == pytest.approx(1.0)
    assert spearman([1, 1], [1, 2]) is None
