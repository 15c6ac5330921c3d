import pytest
from run_folders import entry, quickstart, write_json

from dominie.core.run_records import read_run
from dominie.report.tables import (
    baseline_changes,
    data_table,
    group_table,
    results_grid,
    sources_of,
)


@pytest.fixture
def read(tmp_path):
    def run_of(results):
        write_json(tmp_path / "results.json", results)
        return read_run(tmp_path)

    return run_of


def column(grid, task, key="score"):
    index = next(i for i, c in enumerate(grid.columns) if (c.task, c.key) == (task, key))
    return {model: cells[index] for model, cells in grid.rows}


def test_the_best_is_marked_and_what_is_within_noise_of_it(read):
    cells = column(
        results_grid(
            read({"a": {"t": entry(0.9)}, "b": {"t": entry(0.85)}, "c": {"t": entry(0.5)}})
        ),
        "t",
    )
    assert [cells[name].mark for name in "abc"] == ["best", "tied", ""]
    assert (cells["a"].text, cells["a"].interval) == ("90.0", "86.1–93.9")


def test_a_model_without_a_score_has_a_dash(read):
    grid = results_grid(read({"a": {"t": entry(0.9)}, "b": {"u": entry(0.8)}}))
    assert column(grid, "u")["a"].text == "–"
    assert column(grid, "u")["a"].mark == ""


def test_n_stands_in_the_heading_only_where_it_is_everyones(read):
    grid = results_grid(read({"a": {"t": entry(0.9, n=10)}, "b": {"t": entry(0.9, n=20)}}))
    assert grid.columns[0].n is None
    assert [cell.n for cell in column(grid, "t").values()] == [10, 20]
    grid = results_grid(read({"a": {"t": entry(0.9, n=10)}, "b": {"t": entry(0.9, n=10)}}))
    assert grid.columns[0].n == 10
    assert [cell.n for cell in column(grid, "t").values()] == [None, None]


def test_the_teacher_does_not_compete_in_agreement_to_itself(read):
    grid = results_grid(
        read(
            {
                "teacher": {"t": entry(0.9, kl=0.0, agreement=1.0)},
                "far": {"t": entry(0.5, kl=2.0, agreement=0.4)},
                "near": {"t": entry(0.8, kl=0.08, agreement=0.9)},
            }
        )
    )
    for key in ("kl", "agreement"):
        assert {m: c.mark for m, c in column(grid, "t", key).items()} == {
            "teacher": "",
            "far": "",
            "near": "best",
        }
    assert column(grid, "t", "kl")["near"].text == "0.080"
    assert column(grid, "t", "agreement")["near"].text == "90.0"


def test_of_a_model_to_itself_there_is_nothing_to_estimate(read):
    agreement = {"score": 1.0, "stderr": 0.0, "n": 100, "metric": "agreement"}
    near = {**agreement, "score": 0.9, "stderr": 0.03}
    grid = results_grid(read({"teacher": {"like": agreement}, "near": {"like": near}}))
    cells = column(grid, "like")
    assert (cells["teacher"].text, cells["teacher"].interval, cells["teacher"].mark) == (
        "100.0",
        "",
        "",
    )
    assert cells["near"].mark == "best"


def test_further_figures_stand_under_their_task(tmp_path):
    grid = results_grid(read_run(quickstart(tmp_path)))
    under = {task: [column.key for column in columns] for task, columns in grid.tasks}
    assert under == {
        "general": ["score"],
        "domain": ["score"],
        "agreement": ["score", "kl", "loss"],
    }
    assert [column.drawn for column in grid.columns] == [True, True, False, False, False]


def test_what_cannot_be_told_from_the_best_on_the_same_questions_is_tied(tmp_path):
    """The paired difference decides, not whether two intervals overlap."""
    results = {"a": {"t": entry(0.54)}, "b": {"t": entry(0.50)}, "c": {"t": entry(0.50)}}
    write_json(tmp_path / "results.json", results)
    pair = {"difference": 0.04, "interval": [0.01, 0.07], "verdict": "better"}
    comparisons = {"baseline": "b", "differences": {"t": {"a": {"b": pair}}}}
    write_json(tmp_path / "evaluation" / "comparisons.json", comparisons)
    run = read_run(tmp_path)
    marks = {model: cell.mark for model, cell in column(results_grid(run), "t").items()}
    assert marks == {"a": "best", "b": "", "c": "tied"}
    ((model, steps),) = baseline_changes(run)
    assert (model, steps["t"].within_noise) == ("a", False)


def test_strips_are_drawn_where_there_is_room(read):
    def drawn(count):
        grid = results_grid(read({"a": {f"t{i}": entry(0.5) for i in range(count)}}))
        return {column.drawn for column in grid.columns}

    assert drawn(3) == {True}
    assert drawn(6) == {False}


def test_families_are_rows_and_models_are_columns(tmp_path):
    run = read_run(quickstart(tmp_path))
    table = group_table(run, "general")
    assert [column.label for column in table.columns] == list(run.results)
    rows = dict(table.rows)
    assert list(rows) == ["copy", "sort", "extract", "convert", "facts", "sums", "write"]
    expected = run.results["expert"]["general"].by["sums"].score
    assert rows["sums"][4].value == expected
    assert group_table(run, "nothing") is None


def test_stages_that_counted_a_source_alike_share_a_row(tmp_path):
    run = read_run(quickstart(tmp_path))
    table = data_table(run.stages.values())
    rows = {row.source: row for row in table.rows}
    assert len(table.rows) == 2
    assert set(rows["domain"].stages) == {"expert", "align"}
    assert rows["domain"].counts["too_long"] == 2
    assert [label for _, label in table.keys][:3] == ["read", "duplicates", "held out"]


def test_sources_are_listed_once_in_their_order(tmp_path):
    run = read_run(quickstart(tmp_path))
    assert sources_of(tuple(run.stages.values())) == ("general", "domain")
