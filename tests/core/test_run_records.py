import json
import math

import pytest
from run_folders import SCORES, STAGES, entry, judged, quickstart, write_json, write_lines

from dominie.core.errors import InputError
from dominie.core.run_records import read_run


@pytest.fixture
def run(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    return folder


def test_a_whole_run_is_read_without_a_note(tmp_path):
    run = read_run(quickstart(tmp_path))
    assert run.notes == ()
    assert run.name == "quickstart"
    assert list(run.results) == list(SCORES)
    assert run.tasks == ("general", "domain", "agreement")
    assert run.ability_tasks == ("general", "domain")
    assert set(run.stages) == set(STAGES)
    assert all(stage.done for stage in run.stages.values())
    assert run.stages["align"].teachers == {"domain": "expert", "general": "distill"}
    assert len(run.stages["teacher"].train) == 150
    assert len(run.samples["domain"]["align"]) == 300
    assert run.results["align"]["general"].by["sums"].n == 50
    assert set(run.results["align"]["agreement"].extras) == {"kl", "loss"}


def test_stages_come_after_those_they_need(tmp_path):
    order = list(read_run(quickstart(tmp_path)).stages)
    assert order.index("teacher") < order.index("distill") < order.index("expert")
    assert order.index("expert") < order.index("align")


def test_a_stage_of_any_kind_is_read_by_what_it_wrote(run):
    made = {"status": "done", "fingerprint": "f", "kind": "new", "description": "what it does"}
    write_json(run / "b_makes" / "stage.json", {**made, "models": ["org/big"]})
    write_lines(run / "b_makes" / "data" / "rows.jsonl", [{"a": 1}])
    (run / "b_makes" / "data" / ".scratch").write_text("")
    write_json(run / "a_reads" / "stage.json", {**made, "kind": "train", "data": {"b_makes": {}}})
    write_json(run / "c_merges" / "stage.json", {"kind": "merge", "models": ["a_reads", "x"]})
    stages = read_run(run).stages
    assert list(stages) == ["b_makes", "a_reads", "c_merges"], "data before who reads them"
    new = stages["b_makes"]
    assert (new.kind, new.description, new.models) == ("new", "what it does", ("org/big",))
    assert dict(new.made) == {"rows.jsonl": 9}
    assert stages["c_merges"].description == "merge of a_reads and x"


def test_a_folder_that_is_half_made_is_no_stage(run):
    write_json(run / ".align" / "stage.json", {"status": "done", "fingerprint": "f"})
    (run / "recipe.yaml").write_text("name: a")
    assert read_run(run).stages == {}


def test_stages_that_need_each_other_are_all_kept(run):
    for name, student in (("a", "b"), ("b", "a"), ("c", "c")):
        write_json(run / name / "stage.json", {"status": "done", "student": student})
    assert set(read_run(run).stages) == {"a", "b", "c"}


def test_a_line_cut_off_by_a_crash_is_left_out_with_a_note(run):
    lines = [{"step": 10, "loss": 2.0}, {"step": 20, "loss": 1.5}]
    write_lines(run / "sft" / "metrics.jsonl", lines)
    with (run / "sft" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 30, "lo')
    contents = read_run(run)
    assert [line.values["loss"] for line in contents.stages["sft"].train] == [2.0, 1.5]
    assert not contents.stages["sft"].done
    assert any("1 line of sft/metrics.jsonl" in note for note in contents.notes)
    assert any("sft has not finished" in note for note in contents.notes)


def test_a_stage_that_is_running_counts_what_it_has_done(run):
    write_json(run / "a" / "stage.json", {"status": "running", "student": "b", "data": {}})
    lines = [{"step": 10 * n, "loss": 1.0, "tokens": 500 * n, "seconds": 2.0 * n} for n in (1, 2)]
    write_lines(run / "a" / "metrics.jsonl", lines)
    contents = read_run(run)
    stage = contents.stages["a"]
    assert not stage.done
    assert (stage.steps, stage.supervised_tokens, stage.seconds) == (20, 1000, 4.0)
    assert any("a has not finished" in note for note in contents.notes)


def test_of_a_step_logged_twice_the_resumed_one_counts(run):
    steps = [(10, 3.0), (20, 2.5), (30, 9.9), (20, 2.4), (30, 2.0)]
    write_lines(run / "a" / "metrics.jsonl", [{"step": s, "loss": v} for s, v in steps])
    train = read_run(run).stages["a"].train
    assert [(line.step, line.values["loss"]) for line in train] == [(10, 3.0), (20, 2.4), (30, 2.0)]


def test_losses_that_are_not_finite_are_kept_as_gaps_and_noted(run):
    losses = [1.0, math.nan, math.inf, 0.5]
    lines = [{"step": step, "loss": loss} for step, loss in enumerate(losses)]
    write_lines(run / "a" / "metrics.jsonl", lines)
    contents = read_run(run)
    read = [line.values["loss"] for line in contents.stages["a"].train]
    assert [math.isnan(loss) for loss in read] == [False, True, True, False]
    assert any("not finite at 2 logged steps" in note for note in contents.notes)


def test_a_score_that_is_not_finite_is_left_out_with_a_note(run):
    write_json(run / "results.json", {"a": {"t": entry(math.nan), "u": entry(0.5)}, "b": {}})
    contents = read_run(run)
    assert set(contents.results["a"]) == {"u"}
    assert set(contents.results) == {"a"}
    assert any("no finite score of a on t" in note for note in contents.notes)
    assert any("no score of b" in note for note in contents.notes)


@pytest.mark.parametrize("content", ["", "[1, 2]", "{", "null", '"text"', "[" * 100_000])
def test_results_that_are_not_results_become_a_note(run, content):
    (run / "results.json").write_text(content)
    (run / "recipe.yaml").write_text("name: a")
    contents = read_run(run)
    assert contents.results == {}
    assert any("results.json could not be read" in note for note in contents.notes)


def test_fields_of_the_wrong_type_are_left_out(run):
    odd = {
        "status": 3,
        "student": ["a"],
        "teachers": "none",
        "steps": "many",
        "seconds": True,
        "data": {"general": {"read": "all", "kept": 4}, "domain": 7},
        "versions": [],
    }
    write_json(run / "a" / "stage.json", odd)
    stage = read_run(run).stages["a"]
    assert (stage.student, stage.steps, stage.seconds, stage.teachers) == (None, None, None, {})
    assert stage.data == {"general": {"kept": 4.0}, "domain": {}}


def test_a_model_name_that_no_file_can_have_is_no_obstacle(run):
    write_json(run / "results.json", {"m" * 5000: {"t": entry(0.5)}, "a\0b": {"t": entry(0.5)}})
    assert len(read_run(run).results) == 2


def test_bytes_that_are_not_text_are_replaced(run):
    (run / "recipe.yaml").write_bytes(b"name: \xff\xfe")
    assert read_run(run).recipe == "name: ��"


def test_a_folder_that_is_no_run_is_refused(tmp_path, run):
    with pytest.raises(InputError, match="no such run folder"):
        read_run(tmp_path / "nowhere")
    with pytest.raises(InputError, match="not a run"):
        read_run(run)


def test_many_rows_are_read_in_part(run, monkeypatch):
    monkeypatch.setattr("dominie.core.run_reader._MAXIMUM_SAMPLES", 3)
    write_json(run / "results.json", {"a": {"t": entry(0.5)}})
    rows = [{"prompt": str(row), "target": "", "output": "", "correct": True} for row in range(5)]
    write_lines(run / "evaluation" / "a" / "t.jsonl", rows)
    contents = read_run(run)
    assert len(contents.samples["t"]["a"]) == 3
    assert any("evaluation/a/t.jsonl only the first 3" in note for note in contents.notes)


def test_comparisons_are_read_both_ways(tmp_path):
    run = read_run(judged(tmp_path))
    assert run.baseline == "sft"
    forth, back = (
        run.difference("general", *pair) for pair in (("sft", "align"), ("align", "sft"))
    )
    assert forth is not None
    assert back is not None
    assert (back.estimate, *back.ends) == (-forth.estimate, -forth.high, -forth.low)
    assert run.difference("general", "sft", "nobody") is None
    assert run.judged_tasks == ("mt-bench", "alpaca-eval")
    score = run.results["align"]["mt-bench"]
    assert score.controls == {"empty": 0.1, "constant": 0.31}
    assert score.extras == {}, "a judge's many figures are no columns"
    assert set(run.results["align"]["alpaca-eval"].extras) == {"length_controlled_win_rate"}
    assert run.samples["mt-bench"]["align"][0].verdict is not None


@pytest.mark.parametrize(
    "content",
    [
        "[]",
        '{"baseline": 3, "differences": 4}',
        '{"baseline": "x", "differences": {"t": {"a": {"b": {"difference": "1"}}}}}',
        '{"differences": {"t": {"a": {"b": {"difference": 0.1, "interval": [0.3, 0.1]}}}}}',
        '{"differences": {"t": {"a": {"b": {"difference": NaN, "interval": [0, 1]}}}}}',
        '{"differences": {"t": [], "u": {"a": 1}}}',
    ],
)
def test_comparisons_of_another_shape_are_left_out(run, content):
    write_json(run / "results.json", {"a": {"t": entry(0.5)}, "b": {"t": entry(0.5)}})
    (run / "evaluation").mkdir()
    (run / "evaluation" / "comparisons.json").write_text(content)
    contents = read_run(run)
    assert contents.baseline is None
    assert contents.differences == {}


@pytest.mark.parametrize(
    ("row", "worth"),
    [
        ({"correct": True}, 1.0),
        ({"correct": False, "score": 0.25}, 0.25),
        ({"preference": 1.75}, 0.75),
        ({"preference": None}, None),
        ({"score": 7}, 1.0),
        ({"ratings": [7, 8.0, None]}, 0.75),
        ({"ratings": [None], "correct": True}, 1.0),
        ({"score": "8"}, None),
    ],
)
def test_what_an_answer_was_worth(run, row, worth):
    write_json(run / "results.json", {"a": {"t": entry(0.5)}})
    write_lines(run / "evaluation" / "a" / "t.jsonl", [{"prompt": "p", **row}])
    assert read_run(run).samples["t"]["a"][0].score == worth


def test_recipes_are_shown_as_they_are(tmp_path):
    run = quickstart(tmp_path)
    assert read_run(run).recipe == (run / "recipe.yaml").read_text()
    assert json.loads((run / "results.json").read_text())  # reading changed nothing
