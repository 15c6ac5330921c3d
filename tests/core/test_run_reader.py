"""One reader of run folders, strict for what goes on and tolerant for reports."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from run_folders import entry, write_json, write_lines

from dominie.core.errors import InputError
from dominie.core.io import write_checksummed
from dominie.core.results_file import read_results
from dominie.core.run_reader import (
    found_run,
    is_run,
    read_lines,
    read_metrics,
    read_object,
    read_stage,
    runs_in,
)

DAMAGED = ["", "{", "[1, 2]", "null", "[" * 100_000]


@pytest.mark.parametrize("content", DAMAGED)
@pytest.mark.parametrize("read", [read_results, read_stage])
def test_a_damaged_file_is_an_error_or_a_note(tmp_path, read, content):
    name = {read_results: "results.json", read_stage: "stage.json"}[read]
    (tmp_path / name).write_text(content)
    with pytest.raises(InputError, match=f"(?s){name} cannot be read.*found.*do ") as caught:
        read(tmp_path)
    assert caught.value.where == str(tmp_path / name)
    notes: list[str] = []
    assert read(tmp_path, notes) == {}
    assert len(notes) == 1
    assert "could not be read" in notes[0]


@pytest.mark.parametrize("notes", [None, []])
def test_a_file_that_is_not_there_is_empty(tmp_path, notes):
    assert read_results(tmp_path, notes) == read_stage(tmp_path, notes) == {}
    assert read_metrics(tmp_path, notes) == []
    assert not notes


def test_a_record_that_was_changed_is_an_error_and_is_still_shown(tmp_path):
    path = tmp_path / "stage.json"
    write_checksummed(path, {"fingerprint": "f", "status": "running", "steps": 3})
    whole = {"fingerprint": "f", "status": "running", "steps": 3}
    assert read_stage(tmp_path) == whole
    path.write_text(path.read_text().replace("running", "done"))
    with pytest.raises(InputError, match="checksum"):
        read_stage(tmp_path)
    notes: list[str] = []
    assert read_stage(tmp_path, notes) == {**whole, "status": "done"}
    assert "not as it was written" in notes[0]


def test_an_object_that_is_no_record_of_a_stage(tmp_path):
    write_json(tmp_path / "stage.json", {"status": "done"})
    with pytest.raises(InputError, match="no record of a stage"):
        read_stage(tmp_path)
    assert read_stage(tmp_path, []) == {"status": "done"}


def test_results_are_figures_by_model_and_task(tmp_path):
    whole = {"a": {"t": entry(0.5)}, "b": {}}
    write_json(tmp_path / "results.json", whole)
    assert read_results(tmp_path) == whole
    write_json(tmp_path / "results.json", {**whole, "c": {"t": 3, "u": entry(0.1)}, "d": 4})
    with pytest.raises(InputError, match="no figures of c"):
        read_results(tmp_path)
    assert read_results(tmp_path, []) == {**whole, "c": {"u": entry(0.1)}, "d": {}}


def test_a_line_that_is_being_written_is_not_there_yet(tmp_path):
    write_lines(tmp_path / "metrics.jsonl", [{"step": 1}, {"step": 2}])
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "lo')
    assert read_metrics(tmp_path) == [{"step": 1}, {"step": 2}]
    notes: list[str] = []
    assert read_metrics(tmp_path, notes) == [{"step": 1}, {"step": 2}]
    assert "1 line" in notes[0]


def test_a_broken_line_in_the_middle_is_an_error_that_names_it(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"st\n{"step": 3}\n')
    with pytest.raises(InputError, match=r"(?s)metrics.jsonl cannot be read.*line 2"):
        read_metrics(tmp_path)
    assert read_metrics(tmp_path, []) == [{"step": 1}, {"step": 3}]


def test_many_lines_are_read_in_part(tmp_path):
    path = tmp_path / "evaluation" / "a" / "t.jsonl"
    write_lines(path, [{"row": row} for row in range(5)])
    notes: list[str] = []
    assert len(list(read_lines(path, notes, 3))) == 3
    assert notes == ["Of evaluation/a/t.jsonl only the first 3 rows were read."]


def test_a_file_that_cannot_be_opened(tmp_path):
    for path in (tmp_path / ("m" * 5000), tmp_path / "a\0b"):
        with pytest.raises(InputError, match="cannot be read"):
            list(read_lines(path))
        notes: list[str] = []
        assert list(read_lines(path, notes)) == []
        assert read_object(path, notes) == {}
        assert len(notes) == 2


def test_bytes_that_are_not_text(tmp_path):
    (tmp_path / "results.json").write_bytes(b'{"a": {"t": {"metric": "\xff"}}}')
    with pytest.raises(InputError, match=r"results\.json cannot be read"):
        read_results(tmp_path)
    assert read_results(tmp_path, [])["a"]["t"] == {"metric": "�"}


def test_a_run_is_found_by_its_folder_or_its_name_and_a_recipe_is_none(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    runs = Path("runs")
    write_json(runs / "mine" / "align" / "stage.json", {})
    (tmp_path / "shop").mkdir()
    (tmp_path / "shop" / "recipe.yaml").write_text("name: shop")
    assert is_run(runs / "mine")
    assert not is_run(tmp_path / "shop")
    assert runs_in(runs) == ["mine"]
    assert found_run(runs / "mine", runs) == found_run(Path("mine"), runs) == runs / "mine"
    with pytest.raises(InputError, match="a recipe's folder, and not a run"):
        found_run(tmp_path / "shop", runs)
    with pytest.raises(InputError, match=r"did you mean .*mine"):
        found_run(Path("mime"), runs)


def test_reading_a_run_needs_nothing_heavy():
    program = (
        "import json, sys, dominie.core.run_records; "
        "print(json.dumps([*{'torch', 'numpy', 'transformers', 'rich'} & {*sys.modules}]))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert json.loads(done.stdout) == [], done.stderr
