"""Win rates of annotation files: the published ones, and what bad files are answered with."""

import csv
import json
import signal
import sys
from pathlib import Path

import numpy as np
import pytest

from dominie import cli
from dominie.core.errors import InputError
from dominie.judge.annotations import read_annotations, read_difficulty, summarise
from dominie.judge.length_control import longer_wins, win_rate, wins

DATA = Path(__file__).parents[3] / "shared" / "data" / "alpaca_eval"
PUBLISHED = [("v1", "gpt-3.5-turbo-0301"), ("v2", "FuseChat-Llama-3.2-1B-Instruct")]


@pytest.mark.parametrize(("version", "model"), PUBLISHED)
def test_the_published_win_rate_is_reproduced(version, model):
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
    assert told["length_control"] == "no difficulty"
    published = float(row["length_controlled_winrate"])
    gap = told["length_controlled_win_rate"] - published
    print(
        f"{version} {model}: {told['length_controlled_win_rate']:.2f} % without difficulty, "
        f"published {published:.2f} %, gap {gap:+.2f} points"
    )
    assert abs(gap) < 2.5


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
    assert summary.control == "upstream"
    with pytest.raises(InputError, match="without a difficulty"):
        summarise([*rows, ROW], difficulty, where="f")
    full.write_text("index,length\n0,5\n")
    with pytest.raises(InputError, match="no difficulty"):
        read_difficulty(full)


def test_the_command_line_prints_one_json_object(tmp_path, monkeypatch, capsys):
    path = written(tmp_path / "a.json", [{**ROW, "preference": p} for p in (1.0, 2.0, 2.0, None)])
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
    assert {"standard_error", "length_controlled_win_rate"} <= told.keys()
    assert "no difficulty" in err
