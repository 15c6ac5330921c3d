import os

import pytest

from dominie.core.errors import InputError
from dominie.data.sources import Source, content_fingerprint
from dominie.recipe.load import recipe_of


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


# Folders that hold more, or something else


def read_from(path):
    """The source of a recipe that names this path."""
    stage = {"student": "m", "data": {"d": 1.0}, "loss": {"next_token": 1.0}}
    train = {"learning_rate": 1e-3, "steps": 1, "batch": 1, "max_length": 8}
    tree = {"name": "r", "models": {"m": {"path": "m"}}, "train": train, "stages": {"s": stage}}
    return recipe_of({**tree, "data": {"d": {"path": str(path)}}}).data["d"]


def saved(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    return Source(name="x", path=str(folder))


def test_hidden_files_and_tables_of_contents_are_no_data(tmp_path):
    names = ("._a.jsonl", ".cache/b.jsonl", "dataset_infos.json", "meta-info.json", "a.jsonl")
    assert [file.name for file in saved(tmp_path, *names).local_files()] == ["a.jsonl"]


@pytest.mark.parametrize(
    ("names", "message", "do"),
    [
        (["state.json", "dataset_info.json", "x.arrow"], "datasets.save_to_disk", "to_parquet"),
        (["dataset_dict.json", "train/state.json"], "datasets.save_to_disk", "[SPLIT].to_parquet"),
        (["README.md", "data/x.parquet"], "holds no data file", "data"),
        (["train-00000-of-00001.parquet", "test-00000-of-00001.parquet"], "several splits", "one"),
        (["train.jsonl", "validation.jsonl"], "several splits", "one file"),
        (["Training_1.json", "eval.json"], "several splits", "one file"),
        (["a.jsonl", "b.jsonl.gz"], "a format that cannot be read", "unpack"),
        (["a.jsonl", "data-00000-of-00001.arrow"], "a format that cannot be read", "convert"),
    ],
)
def test_folders_that_are_read_otherwise_are_refused(tmp_path, names, message, do):
    with pytest.raises(InputError, match=message) as caught:
        saved(tmp_path, *names).local_files()
    assert do in caught.value.do


def test_files_of_one_split_and_names_like_splits_are_read(tmp_path):
    names = ["train-00000-of-00002.parquet", "train-00001-of-00002.parquet", "trains.jsonl"]
    assert len(saved(tmp_path, *names, "tested.jsonl").local_files()) == 4


def test_a_link_of_the_hubs_cache_keeps_its_name(tmp_path):
    (tmp_path / "blob").write_text('{"prompt": "a", "completion": "b"}')
    (tmp_path / "x.jsonl").symlink_to("blob")
    assert read_from(tmp_path / "x.jsonl").local_files() == [tmp_path / "x.jsonl"]


# What is no file


@pytest.mark.parametrize("kind", ["pipe", "loop", "nowhere", "device", "folder"])
@pytest.mark.parametrize("inside", [False, True])
def test_what_is_no_regular_file_is_refused_and_not_read(tmp_path, kind, inside):
    place = tmp_path / "x.jsonl"
    if kind == "pipe":
        os.mkfifo(place)
    elif kind == "folder":
        place.mkdir()
    else:
        place.symlink_to({"loop": "x.jsonl", "nowhere": "y", "device": "/dev/zero"}[kind])
    if kind == "folder" and not inside:
        return  # a folder of this name is a folder of files
    source = read_from(tmp_path if inside else place)
    with pytest.raises(InputError, match="not a regular file") as caught:
        content_fingerprint(source)
    assert caught.value.where == str(place)


@pytest.mark.parametrize(
    "path", ["a\0b.jsonl", "x" * 5000 + ".jsonl", "x/" * 3000 + "y.jsonl", "~no-such-user/x.jsonl"]
)
def test_names_that_no_file_can_have_are_missing_files(path):
    with pytest.raises(InputError, match=r"there is no such file|holds a NUL") as caught:
        content_fingerprint(read_from(path))
    assert len(str(caught.value)) < 1000
    assert "\0" not in str(caught.value)
