import pytest

from dominie.core.errors import InputError
from dominie.data.sources import Source


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"validation_fraction": -0.1}, "validation_fraction is not a fraction"),
        ({"test_fraction": 1.5}, "test_fraction is not a fraction"),
        ({"validation_fraction": 0.6, "test_fraction": 0.5}, "more than the whole"),
        ({"too_long": "split"}, "too_long names no treatment"),
        ({"test_fraction": float("nan")}, "test_fraction is not a fraction"),
    ],
)
def test_impossible_options_are_refused(options, message):
    with pytest.raises(InputError, match=message) as caught:
        Source(name="general", path="x.jsonl", **options)
    assert caught.value.where == "source general"


def test_fractions_that_sum_to_the_whole_are_allowed():
    source = Source(name="x", path="x.jsonl", validation_fraction=0.9, test_fraction=0.1)
    assert source.held_out_fraction == 1


@pytest.mark.parametrize(
    ("path", "local"),
    [
        ("data/missing.jsonl", True),
        ("data/missing.csv", True),
        ("/data/missing", True),
        ("./missing", True),
        ("a/b/c", True),
        ("openai/gsm8k", False),
        ("HuggingFaceH4/ultrachat_200k", False),
        ("org/name-1.5", False),
        ("squad", False),
    ],
)
def test_paths_are_told_from_hub_ids(path, local):
    assert Source(name="x", path=path).is_local is local


def test_what_exists_is_local_whatever_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data" / "general").mkdir(parents=True)
    assert Source(name="x", path="data/general").is_local


def test_files_of_a_folder_come_in_the_order_of_their_names(tmp_path):
    for name in ("b.jsonl", "a.parquet", "c.JSON", "README.md"):
        (tmp_path / name).touch()
    names = [file.name for file in Source(name="x", path=str(tmp_path)).local_files()]
    assert names == ["a.parquet", "b.jsonl", "c.JSON"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("missing.jsonl", "no such file"),
        ("notes.txt", "does not tell a format"),
        ("empty", "holds no data file"),
    ],
)
def test_paths_that_hold_no_data_are_refused(tmp_path, name, message):
    (tmp_path / "notes.txt").write_text("hello")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=message) as caught:
        Source(name="x", path=str(tmp_path / name)).local_files()
    assert caught.value.where == str(tmp_path / name)
    assert ".parquet" in caught.value.expected
