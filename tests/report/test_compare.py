"""Runs side by side: known numbers, a front that holds, a page that needs nothing else."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import pytest
from rich.console import Console

from dominie.core.errors import InputError
from dominie.core.task_result import estimate
from dominie.report import compare_runs, comparison_table, write_comparison
from dominie.report.compare import front
from dominie.report.scatter import pareto_front


def run(
    folder: Path, scores: dict[str, tuple[float, float]], seed: int | None = None, **values: str
) -> Path:
    folder.mkdir()
    results = {
        model: {
            task: {"score": score, "stderr": 0.01, "n": 400, "metric": "exact_match"}
            for task, score in zip(("general", "domain"), pair, strict=True)
        }
        for model, pair in scores.items()
    }
    (folder / "results.json").write_text(json.dumps(results))
    if seed is not None:
        (folder / "sweep.json").write_text(json.dumps({"seed": seed, "values": values}))
    return folder


@pytest.fixture
def three(tmp_path) -> list[Path]:
    """Three seeds; `dae` is 10 points better than `mix` on domain, always, whatever the seed."""
    return [
        run(
            tmp_path / f"s{seed}",
            {
                "mix": (0.80 + luck, 0.70 + luck),
                "dae": (0.81 + luck, 0.80 + luck),
                "expert": (0.10, 0.90),
                "poor": (0.05, 0.80),
            },
            seed=seed,
        )
        for seed, luck in ((0, 0.0), (1, 0.05), (2, -0.05))
    ]


def test_models_of_different_recipes_are_named_with_their_run(tmp_path):
    scores = {"small": (0.1, 0.0), "align": (0.2, 0.3)}
    mine = run(tmp_path / "mine", scores)
    half = run(tmp_path / "half", {**scores, "align": (0.2, 0.5)})
    (mine / "recipe.yaml").write_text("name: mine\ntrain:\n  seed: 0\nshare: 0.1\n")
    (half / "recipe.yaml").write_text("name: half\ntrain:\n  seed: 0\nshare: 0.5\n")
    found = compare_runs([mine, half], across=None, upwards=None, against=None)
    assert [(p.name, p.y.mean, p.runs) for p in found.points] == [
        ("small", 0.0, 1),
        ("align (mine)", 0.3, 1),
        ("align (half)", 0.5, 1),
    ]


def test_runs_that_differ_in_their_seed_are_siblings(tmp_path):
    paths = [run(tmp_path / f"s{seed}", {"a": (0.1 * seed, 0.5)}) for seed in (1, 2)]
    for seed, path in enumerate(paths):
        (path / "recipe.yaml").write_text(f"name: s{seed}\ntrain:\n  seed: {seed}\n")
    (point,) = compare_runs(paths, across=None, upwards=None, against=None).points
    assert (point.name, point.runs) == ("a", 2)


def test_students_interval_of_known_numbers():
    found = estimate([1.0, 2.0, 3.0, 4.0, 5.0])
    assert found.mean == 3.0
    assert found.half == pytest.approx(2.776 * (2.5 / 5) ** 0.5)
    assert estimate([0.4]).half is None
    agreed = estimate([0.4, 0.4 + 1e-15])
    assert agreed.half is None, "runs that agree are no certainty"
    assert not agreed.significant
    assert estimate([float(i % 2) for i in range(50)]).half == pytest.approx(
        1.96 * (0.25 * 50 / 49) ** 0.5 / 50**0.5
    )


def test_models_are_averaged_over_runs_and_compared_in_pairs(three):
    found = compare_runs(three, across=None, upwards=None, against="mix")
    points = {point.name: point for point in found.points}
    assert found.tasks == ("general", "domain")
    assert points["dae"].runs == 3
    assert points["dae"].y.mean == pytest.approx(0.80)
    assert points["dae"].y.half == pytest.approx(
        math.hypot(4.303 * 0.05 / 3**0.5, 1.96 * 0.01), rel=1e-3
    )
    difference = points["dae"].differences
    assert difference
    assert difference[1].mean == pytest.approx(0.10)
    questions = 1.96 * 0.01 * 2**0.5  # luck is the seed's, not the model's: these are left
    assert difference[1].half == pytest.approx(questions, rel=1e-3)
    assert difference[1].significant
    assert not difference[0].significant, "one point, of 400 questions"
    assert points["mix"].differences is None
    assert [point.name for point in front(found.points)] == ["expert", "dae"]
    swapped = compare_runs(three, across="domain", upwards=None, against=None)
    assert swapped.tasks == ("domain", "general")


def alike(folder: Path, seed: int | None = None, recipe: str = "", **scores) -> Path:
    """A run whose models score 0.5 and 0.55 on 40 questions, as the tests of agreement need."""
    path = run(folder, scores or {"base": (0.5, 0.5), "better": (0.55, 0.6)}, seed=seed)
    results = json.loads((path / "results.json").read_text())
    for tasks in results.values():
        for entry in tasks.values():
            score = entry["score"]
            entry |= {"n": 40, "stderr": 0.08, "interval": [score - 0.15, score + 0.15]}
    (path / "results.json").write_text(json.dumps(results))
    if recipe:
        (path / "recipe.yaml").write_text(recipe)
    return path


@pytest.mark.parametrize("how", ["named twice", "by another path", "copied", "copied, renamed"])
def test_a_run_twice_is_one_run(tmp_path, how):
    recipe = "name: {}\ntrain:\n  seed: 3\n"
    first = alike(tmp_path / "one", recipe=recipe.format("one"))
    second = first
    if how == "by another path":
        second = tmp_path / "there"
        second.symlink_to(first)
    elif how.startswith("copied"):
        name = "two" if "renamed" in how else "one"
        second = alike(tmp_path / "two", recipe=recipe.format(name))
    once = compare_runs([first], across=None, upwards=None, against="base")
    twice = compare_runs([first, second], across=None, upwards=None, against="base")
    assert twice.points == once.points
    assert [point.runs for point in twice.points] == [1, 1]
    (note,) = twice.notes
    assert "counts once" in note
    assert not once.notes


def test_a_copy_that_scored_further_models_adds_them(tmp_path):
    first = alike(tmp_path / "one", seed=0, base=(0.5, 0.5), old=(0.1, 0.1))
    second = alike(tmp_path / "two", seed=0, base=(0.5, 0.5), new=(0.2, 0.2))
    found = compare_runs([first, second], across=None, upwards=None, against="base")
    assert {point.name: point.runs for point in found.points} == {"base": 1, "old": 1, "new": 1}
    assert all(point.differences for point in found.points if point.name != "base")


def test_two_seeds_that_agree_are_no_certainty(tmp_path):
    paths = [alike(tmp_path / f"s{seed}", seed=seed) for seed in (0, 1)]
    found = compare_runs(paths, across=None, upwards=None, against="base")
    base, better = found.points
    assert (base.runs, better.runs) == (2, 2)
    assert base.x.half == pytest.approx(0.15), "of the questions, which both share"
    assert better.differences is not None
    assert better.differences[1].half == pytest.approx(0.15 * 2**0.5)
    assert not better.differences[1].significant
    for path in paths:  # nothing is known of the questions either
        results = json.loads((path / "results.json").read_text())
        bare = {
            model: {task: {"score": entry["score"]} for task, entry in tasks.items()}
            for model, tasks in results.items()
        }
        (path / "results.json").write_text(json.dumps(bare))
    found = compare_runs(paths, across=None, upwards=None, against="base")
    assert found.points[1].differences is not None
    assert [each.half for each in found.points[1].differences] == [None, None]
    assert not any(each.significant for each in found.points[1].differences)


def test_a_difference_in_pairs_is_taken_from_the_run(tmp_path):
    path = alike(tmp_path / "one")
    (path / "evaluation").mkdir()
    pair = {"difference": 0.1, "interval": [0.02, 0.19]}
    record = {"baseline": "base", "differences": {"domain": {"better": {"base": pair}}}}
    (path / "evaluation" / "comparisons.json").write_text(json.dumps(record))
    for against, sign in (("base", 1), ("better", -1)):
        found = compare_runs([path], across=None, upwards=None, against=against)
        (point,) = [point for point in found.points if point.differences]
        assert point.differences is not None
        assert point.differences[1].mean == pytest.approx(0.1 * sign)
        assert sorted(abs(end) for end in point.differences[1].ends or ()) == pytest.approx(
            [0.02, 0.19]
        )
        assert point.differences[1].significant
        assert not point.differences[0].significant, "of 40 questions without pairs"


def asked(path: Path, questions: int, count: int, word: str = "") -> Path:
    """Give a run the answers to so many questions, of which its results are."""
    results = json.loads((path / "results.json").read_text())
    for model, tasks in results.items():
        for task, entry in tasks.items():
            entry["n"] = questions
            file = path / "evaluation" / model / f"{task}.jsonl"
            file.parent.mkdir(parents=True, exist_ok=True)
            rows = [
                {"prompt": f"{word}{i}", "target": "t", "output": path.name} for i in range(count)
            ]
            file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (path / "results.json").write_text(json.dumps(results))
    return path


@pytest.mark.parametrize(
    ("first", "second"),
    [((40, 0), (20, 0)), ((40, 4), (40, 5)), ((40, 4), (40, 4, "other "))],
)
def test_runs_over_other_questions_are_not_pooled_in_silence(tmp_path, first, second):
    better = {"base": (0.2, 0.2), "better": (0.3, 0.4)}
    paths = [
        asked(alike(tmp_path / "one", seed=0), *first),
        asked(alike(tmp_path / "two", seed=1, **better), *second),
        asked(alike(tmp_path / "three", seed=2), *first),
    ]
    found = compare_runs(paths, across=None, upwards=None, against="base")
    points = {point.name: point for point in found.points}
    assert {name: point.runs for name, point in points.items()} == {
        "base (one, three)": 2, "base (two)": 1, "better (one, three)": 2, "better (two)": 1,
    }  # fmt: skip
    assert len(found.notes) == 2
    assert all("asked other questions" in note for note in found.notes)
    differences = points["better (two)"].differences
    assert differences is not None
    assert differences[1].mean == pytest.approx(0.2), "to the base of the same run"
    assert points["base (two)"].differences is None


def test_runs_over_the_same_questions_are_averaged(tmp_path):
    paths = [asked(alike(tmp_path / f"s{seed}", seed=seed), 40, 4) for seed in (0, 1)]
    found = compare_runs(paths, across=None, upwards=None, against=None)
    assert [point.runs for point in found.points] == [2, 2]
    assert not found.notes


def test_a_seed_that_is_missing_is_left_out_of_the_pairs(three, tmp_path):
    extra = run(tmp_path / "extra", {"mix": (0.0, 0.0)}, seed=7)
    found = compare_runs([*three, extra], across=None, upwards=None, against="mix")
    points = {point.name: point for point in found.points}
    assert (points["mix"].runs, points["dae"].runs) == (4, 3)
    assert points["dae"].differences
    assert points["dae"].differences[1].mean == pytest.approx(0.10)


def test_values_of_a_sweep_name_the_points(tmp_path):
    key = "stages.mix.train.learning_rate"
    paths = [
        run(tmp_path / f"{rate}-{seed}", {"mix": (0.5, 0.5)}, seed=seed, **{key: rate, "a.b": "1"})
        for rate in ("1e-3", "2e-3")
        for seed in (0, 1)
    ]
    names = [p.name for p in compare_runs(paths, across=None, upwards=None, against=None).points]
    assert names == ["mix (learning_rate 1e-3)", "mix (learning_rate 2e-3)"]


def test_one_run_has_the_interval_of_its_questions(three):
    found = compare_runs(three[:1], across=None, upwards=None, against=None)
    assert found.points[0].x.half == pytest.approx(1.96 * 0.01, rel=1e-3)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"across": "genral"}, "no such task.*general"),
        ({"against": "mx"}, "no such model to compare with.*mix"),
        ({"across": "general", "upwards": "general"}, "a scatter plot needs two tasks"),
    ],
)
def test_what_is_not_there_is_named(three, options, words):
    asked = {"across": None, "upwards": None, "against": None} | options
    with pytest.raises(InputError, match=f"(?s){words}"):
        compare_runs(three, **asked)


def test_runs_without_results_are_noted(three, tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    (empty / "recipe.yaml").write_text("name: empty")
    asked = {"across": None, "upwards": None, "against": None}
    notes = compare_runs([*three, empty], **asked).notes
    assert any("empty: Nothing has been evaluated" in note for note in notes)
    with pytest.raises(InputError, match="two tasks"):
        compare_runs([empty], **asked)
    with pytest.raises(InputError, match="no such run folder"):
        compare_runs([tmp_path / "none"], **asked)


def test_a_run_of_other_tasks_is_not_left_out_in_silence(three, tmp_path):
    other = run(tmp_path / "other", {"align": (0.5, 0.5)})
    results = json.loads((other / "results.json").read_text())
    ((first, score), *_) = results["align"].items()
    (other / "results.json").write_text(json.dumps({"align": {first: score, "else": score}}))
    asked = {"across": None, "upwards": None, "against": None}
    (note,) = compare_runs([*three, other], **asked).notes
    assert note.startswith("other: left out, none of its models was scored on both")


def test_the_page_needs_no_other_file_and_has_the_figures_of_the_table(three, tmp_path):
    found = compare_runs(three, across=None, upwards=None, against="mix")
    write_comparison(found, tmp_path / "out" / "compared.html")
    page = (tmp_path / "out" / "compared.html").read_text()
    assert not re.search(r'(?:src|href)="|@import|url\(', page)
    assert page.count("<circle") == 4
    assert 'class="front"' in page
    console = Console(width=120, record=True, file=open("/dev/null", "w"))  # noqa: SIM115, PTH123
    console.print(comparison_table(found))
    text = console.export_text()
    assert re.search(r"● +dae +81.0 ±12.6 +80.0 ±12.6 +\+1.0 ±2.8 +\+10.0 ±2.8\* +3", text), text
    assert re.search(r"\n +poor", text)
    assert text.index("expert") < text.index("dae") < text.index("mix")


def test_the_front_is_what_nothing_beats_from_left_to_right():
    places = {
        "teacher": (0.98, 0.0),
        "distill": (0.88, 0.0),
        "align": (0.88, 0.91),
        "expert": (0.02, 0.92),
        "merged": (0.5, 0.5),
    }
    assert pareto_front(places) == ["expert", "align", "teacher"]


def test_names_in_one_place_share_it():
    assert pareto_front({"a": (0.5, 0.5), "b": (0.5, 0.5), "c": (0.5, 0.4)}) == ["a", "b"]


def test_of_nothing_there_is_none():
    assert pareto_front({}) == []
