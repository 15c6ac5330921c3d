"""Runs side by side: known numbers, a front that holds, a page that needs nothing else."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from rich.console import Console

from dominie.core.errors import InputError
from dominie.report import compare_runs, comparison_table, write_comparison
from dominie.report.compare import estimate, front, pareto_front


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
    assert estimate([float(i % 2) for i in range(50)]).half == pytest.approx(
        1.96 * (0.25 * 50 / 49) ** 0.5 / 50**0.5
    )


def test_models_are_averaged_over_runs_and_compared_in_pairs(three):
    found = compare_runs(three, across=None, upwards=None, against="mix")
    points = {point.name: point for point in found.points}
    assert found.tasks == ("general", "domain")
    assert points["dae"].runs == 3
    assert points["dae"].y.mean == pytest.approx(0.80)
    assert points["dae"].y.half == pytest.approx(4.303 * 0.05 / 3**0.5, rel=1e-3)
    difference = points["dae"].differences
    assert difference
    assert difference[1].mean == pytest.approx(0.10)
    assert difference[1].half == pytest.approx(0.0, abs=1e-9), "luck is the seed's, not the model's"
    assert difference[1].significant
    assert points["mix"].differences is None
    assert [point.name for point in front(found.points)] == ["expert", "dae"]
    swapped = compare_runs(three, across="domain", upwards=None, against=None)
    assert swapped.tasks == ("domain", "general")


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
    assert re.search(r"● +dae +81.0 ±12.4 +80.0 ±12.4 +\+1.0 ±0.0\* +\+10.0 ±0.0\* +3", text), text
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
