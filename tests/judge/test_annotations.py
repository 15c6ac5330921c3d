"""Win rates of annotation files: the published ones, and what bad files are answered with."""

import csv
import json
import signal
import sys
from pathlib import Path

import numpy as np
import pytest

from dominie import cli
from dominie.core.display import Display
from dominie.core.errors import InputError
from dominie.judge.annotations import read_annotations, read_difficulty, summarise
from dominie.judge.length_control import longer_wins, win_rate, wins
from dominie.stages.judged import annotated_win_rates

DATA = Path(__file__).parents[3] / "shared" / "data" / "alpaca_eval"
PUBLISHED = [("v1", "gpt-3.5-turbo-0301", False), ("v2", "FuseChat-Llama-3.2-1B-Instruct", True)]


@pytest.mark.parametrize(("version", "model", "overlaps"), PUBLISHED)
def test_the_published_win_rate_is_reproduced(version, model, overlaps):
    path = DATA / version / f"annotations_{model}.json"
    if not path.exists():
        pytest.skip("the published annotations are not here")
    with (DATA / version / "leaderboard.csv").open() as file:
        row = next(r for r in csv.DictReader(file) if r[""] == model)
    told = summarise(read_annotations(path), where=str(path)).percent()
    assert told["win_rate"] == pytest.approx(float(row["win_rate"]), abs=1e-9)
    assert told["standard_error"] == pytest.approx(float(row["standard_error"]), abs=1e-9)
    assert told["discrete_win_rate"] == pytest.approx(float(row["discrete_win_rate"]), abs=1e-9)
    counted = [told["n_wins"], told["n_wins_base"], told["n_draws"], told["n"]]
    assert counted == [int(row[k]) for k in ("n_wins", "n_wins_base", "n_draws", "n_total")]
    assert told["n"] + told["n_excluded"] == 805
    assert told["avg_length"] == pytest.approx(float(row["avg_length"]), abs=1)
    if not overlaps:
        assert "length_controlled_win_rate" not in told
        assert "longer than the baseline's in 90 % of pairs" in told["length_control"]
        return
    assert told["length_control"] == "no difficulty"
    gap = told["length_controlled_win_rate"] - float(row["length_controlled_winrate"])
    assert abs(gap) < 1.0


def test_nulls_and_nonsense_are_excluded_and_counted():
    found = win_rate([2, 1.0, None, 1.5, 0, "2", 7, -1, float("nan"), True, 1.75])
    assert found is not None
    assert (found.n, found.excluded) == (5, 6)
    assert (found.wins, found.losses, found.draws) == (2, 1, 2)
    assert found.win_rate == pytest.approx((1 + 0 + 0.5 + 0.5 + 0.75) / 5)
    assert found.discrete_win_rate == pytest.approx((2 + 1) / 5)
    assert win_rate([None, 9]) is None
    assert wins([0, 1.2, None]) == [0.5, pytest.approx(0.2), None]


def test_the_length_only_predictor():
    lengths = [(10, 20), (10, 5), (10, 20), (10, 10), (10, 30)]
    assert longer_wins(lengths, [1.0, 0.0, 0.2, 1.0, None]) == pytest.approx(2 / 3)
    assert longer_wins(lengths, [0.5] * 5) is None


def written(path, rows) -> Path:
    path.write_text(json.dumps(rows))
    return path


ROW = {"instruction": "i", "output_1": "a", "output_2": "bb", "preference": 2.0}


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([], "empty"),
        ([{"instruction": "i"}], "without a preference"),
        ([{**ROW, "preference": None}], "no row has a preference"),
        ([{**ROW, "generator_2": "a"}, {**ROW, "generator_2": "b"}], "several models"),
        ([{**ROW, "annotator": "a"}, {**ROW, "annotator": "b"}], "several annotators"),
        ([{**ROW, "annotator": "a"}, {**ROW, "annotator": None}], "several annotators"),
        ([ROW, {**ROW, "preference": 1.0}], "occurs twice"),
        ([ROW, {**ROW, "instruction": "other"}, ROW], "occurs twice"),
    ],
)
def test_bad_files_are_refused(tmp_path, rows, words):
    path = written(tmp_path / "a.json", rows)
    with pytest.raises(InputError, match=words):
        summarise(read_annotations(path), where=str(path))
    (tmp_path / "b.json").write_text('[{"preference": 1.0},\n {"preference":')
    with pytest.raises(InputError, match=r"b\.json:2"):
        read_annotations(tmp_path / "b.json")
    with pytest.raises(InputError, match="no such file"):
        read_annotations(tmp_path / "c.json")


def test_without_outputs_there_is_no_length_to_control():
    told = summarise([{"preference": 2.0}, {"preference": 1.0}], where="f").percent()
    assert told["win_rate"] == 50
    assert "length_controlled_win_rate" not in told


@pytest.mark.parametrize(
    ("broken", "side"),
    [
        ({"output_2": None}, "outputs of the model"),
        ({"output_2": ""}, "outputs of the model"),
        ({"output_1": "$ERROR$"}, "baseline outputs"),
    ],
)
def test_outputs_that_are_none_are_told(broken, side, tmp_path):
    rows = [{**row, "instruction": str(i)} for i, row in enumerate(drawn(100, around, rarely))]
    rows[6] |= broken
    path = written(tmp_path / "a.json", rows)
    lines: list[str] = []
    display = Display()
    display.line = lines.append  # type: ignore[method-assign]
    told = annotated_win_rates(path, None, display)
    (warning,) = told["warnings"]
    assert warning.startswith(f"1 of 100 {side} are empty or the mark of a failed call")
    assert "'row 7' the first" in warning
    assert f"  warning: {warning}" in lines
    if None in broken.values():
        assert told["length_control"] == "none: 1 of 100 rows lack an output, row 7 the first"
    else:
        assert told["length_control"] == "no difficulty"


def test_the_baseline_against_itself_is_even():
    rows = [{**ROW, "preference": 1.9, "generator_1": "x", "generator_2": "x"}] * 5
    assert summarise(rows, where="f").percent()["length_controlled_win_rate"] == 50


def test_difficulty_files(tmp_path):
    plain = tmp_path / "instruction_difficulty.csv"
    plain.write_text(",instruction_difficulty\n0,0.5\n1,-1.5\n")
    assert read_difficulty(plain).of == {0: 0.5, 1: -1.5}
    assert read_difficulty(plain).gamed is None
    full = tmp_path / "df_gamed.csv"
    full.write_text(
        "index,preference,std_delta_len,instruction_difficulty,not_gamed_baseline,model\n"
        "0,0.25,1.5,0.5,False,verbose\n1,0.75,-2.0,-1.5,False,terse\n1,,-2.0,-1.5,False,terse\n"
    )
    difficulty = read_difficulty(full)
    assert difficulty.gamed is not None
    np.testing.assert_array_equal(difficulty.gamed.difference, [1.5, -2.0])
    rows = [{**ROW, "preference": p} for p in (1.0, 2.0)]
    summary = summarise(rows, difficulty, where="f")
    assert "95 % interval" in summary.control, "of two rows nothing is known"
    with pytest.raises(InputError, match="without a difficulty"):
        summarise([*rows, ROW], difficulty, where="f")
    full.write_text("index,length\n0,5\n")
    with pytest.raises(InputError, match="no difficulty"):
        read_difficulty(full)


def drawn(n, lengths, wins):
    """Rows whose lengths and preferences a seed decides."""
    random = np.random.default_rng(7)
    rows = []
    for i in range(n):
        baseline, model = lengths(random)
        preference = 1.0 + wins(random, model - baseline)
        rows.append({**ROW, "instruction": str(i), "preference": preference})
        rows[-1] |= {"output_1": "a" * baseline, "output_2": "b" * model}
    return rows


def around(random):
    return int(random.integers(100, 900)), int(random.integers(100, 900))


def terse(random):
    return int(random.integers(300, 900)), int(random.integers(1, 40))


def rarely(random, _):
    return float(random.random() < 0.1)


@pytest.mark.parametrize(
    ("n", "lengths", "wins", "words"),
    [
        (300, terse, rarely, "shorter than the baseline's in 100 % of pairs; equal length lies"),
        (300, lambda r: terse(r)[::-1], rarely, "longer than the baseline's in 100 % of pairs"),
        (300, lambda r: (80, 50), rarely, "over 100 standard"),  # always by as much
        # Within a character of it, which makes no difference to the fit's covariate.
        (300, lambda r: (int(r.integers(900, 902)), 1), rarely, "over 100 standard"),
        # Half as long again in most pairs: some overlap, and too little of it.
        (300, lambda r: (200, int(r.normal(300, 60))), rarely, "(at most 1)"),
        (16, around, rarely, "(at least 10)"),
        (100, around, lambda _, more: float(more > 0), "follows from length alone"),
        (100, around, lambda _, more: float(more <= 0), "follows from length alone"),
        (100, around, lambda _, more: 0.9999 * (more > 0), "follows from length alone"),
        (100, around, lambda _, more: 1.0, "always the same"),
        (100, lambda r: (50, 50), lambda _, more: 0.0, "always the same"),
    ],
)
def test_where_lengths_do_not_overlap_there_is_no_rate_at_equal_length(n, lengths, wins, words):
    summary = summarise(drawn(n, lengths, wins), where="f")
    assert summary.controlled is None
    assert words in summary.control
    told = summary.percent()
    assert told["length_control"] == summary.control
    assert "length_controlled_win_rate" not in told
    assert told["win_rate"] == pytest.approx(100 * summary.wins.win_rate)


@pytest.mark.parametrize(
    "lengths",
    [around, lambda r: (50, 50), lambda r: (200, int(r.normal(230, 60)))],
)
def test_where_lengths_overlap_there_is_one(lengths):
    def prefers_length(random, more):
        return float(random.random() < (0.6 if more > 0 else 0.4))

    summary = summarise(drawn(400, lengths, prefers_length), where="f")
    assert summary.control == "no difficulty"
    assert summary.controlled is not None
    assert abs(summary.controlled.win_rate - 0.5) < 4 * summary.controlled.standard_error
    assert summary.controlled.standard_error < 0.05


def test_difficulty_alone_does_not_make_lengths_overlap(tmp_path):
    rows = drawn(60, terse, rarely)
    plain = tmp_path / "instruction_difficulty.csv"
    lines = [f"{i},{(-1) ** i * i / 60}" for i in range(60)]
    plain.write_text("\n".join([",instruction_difficulty", *lines]))
    summary = summarise(rows, read_difficulty(plain), where="f")
    assert summary.controlled is None
    assert summary.control.startswith("none: ")
    full = tmp_path / "df_gamed.csv"  # terse and verbose baselines, as upstream regularises
    lines = [
        f"{i},{0.2 + 0.5 * longer},{1.5 - 3 * longer},{(-1) ** i * i / 60},False"
        for i in range(60)
        for longer in (0, 1)
    ]
    head = "index,preference,std_delta_len,instruction_difficulty,not_gamed_baseline"
    full.write_text("\n".join([head, *lines]))
    assert summarise(rows, read_difficulty(full), where="f").control == "upstream"


def test_the_command_line_prints_one_json_object(tmp_path, monkeypatch, capsys):
    rows = [
        {**ROW, "preference": p, "instruction": str(i)} for i, p in enumerate((1.0, 2.0, 2.0, None))
    ]
    path = written(tmp_path / "a.json", rows)
    monkeypatch.setattr(
        sys, "argv", ["dominie", "evaluate", "--json", "--from-annotations", str(path)]
    )
    handlers = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}
    with pytest.raises(SystemExit) as left:
        cli.main()
    for signum, handler in handlers.items():
        signal.signal(signum, handler)
    out, err = capsys.readouterr()
    assert left.value.code == 0, err
    told = json.loads(out)
    assert told["win_rate"] == pytest.approx(200 / 3)
    assert (told["n"], told["n_excluded"]) == (3, 1)
    assert "length_controlled_win_rate" not in told
    assert told["length_control"] in err, "shown to people as well"


def test_a_fit_that_keeps_no_term_gives_no_rate_at_equal_length():
    def won(random, _):
        return float(random.random() < 0.45)

    summary = summarise(drawn(60, around, won), where="f")
    assert summary.wins.win_rate != 0.5
    assert summary.controlled is None
    assert "keeps no term" in summary.control
    even = summarise(drawn(60, around, lambda *_: 0.5), where="f")
    assert even.controlled is not None
    assert even.controlled.win_rate == 0.5


def test_outputs_that_hold_thoughts_are_said():
    rows = [{**row, "output_2": "<think>a</think>b"} for row in drawn(3, around, rarely)]
    (note,) = summarise(rows, where="f").notes
    assert "3 of 3 outputs of the model hold thoughts" in note


@pytest.mark.parametrize("key", ["annotator", "generator_2"])
def test_rows_of_which_some_name_nobody_are_of_several(tmp_path, key):
    rows = [{**ROW, key: "one", "instruction": "a"}, {**ROW, "instruction": "b"}]
    rows[1].pop(key, None)
    path = tmp_path / "a.json"
    path.write_text(json.dumps(rows))
    with pytest.raises(InputError, match="none named, one"):
        read_annotations(path)
