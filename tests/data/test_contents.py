import sys
import types

import pytest

from dominie.core.errors import InputError
from dominie.data.sources import Source, content_fingerprint


def test_files_are_known_by_their_bytes_and_order(tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "a.jsonl").write_text("one")
    (folder / "b.jsonl").write_text("two")
    source = Source(name="x", path=str(folder))
    before = content_fingerprint(source)
    folder.rename(tmp_path / "moved")
    assert content_fingerprint(Source(name="y", path=str(tmp_path / "moved"))) == before
    (tmp_path / "moved" / "a.jsonl").rename(tmp_path / "moved" / "c.jsonl")
    swapped = content_fingerprint(Source(name="x", path=str(tmp_path / "moved")))
    assert swapped != before
    (tmp_path / "moved" / "c.jsonl").rename(tmp_path / "moved" / "a.jsonl")
    (tmp_path / "moved" / "a.jsonl").write_text("onetwo")
    assert content_fingerprint(Source(name="x", path=str(tmp_path / "moved"))) != before


def test_hub_data_is_known_by_its_revision(monkeypatch):
    class HfApi:
        def dataset_info(self, path):
            return types.SimpleNamespace(sha=f"revision of {path}")

    monkeypatch.setitem(sys.modules, "huggingface_hub", types.SimpleNamespace(HfApi=HfApi))
    one = content_fingerprint(Source(name="x", path="org/chats", subset="en"))
    assert "revision of org/chats" in one
    assert content_fingerprint(Source(name="x", path="org/chats", subset="de")) != one


def test_a_hub_that_cannot_be_reached_is_an_input_error(monkeypatch):
    class HfApi:
        def dataset_info(self, path):
            raise ConnectionError("no network")

    monkeypatch.setitem(sys.modules, "huggingface_hub", types.SimpleNamespace(HfApi=HfApi))
    with pytest.raises(InputError, match="neither a file here nor a hub data set"):
        content_fingerprint(Source(name="x", path="org/chats"))


def test_a_file_that_cannot_be_read_is_an_input_error(tmp_path, monkeypatch):
    path = tmp_path / "x.jsonl"
    path.touch()

    def refuse(*args, **kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(type(path), "open", refuse)
    with pytest.raises(InputError, match="cannot be read"):
        content_fingerprint(Source(name="x", path=str(path)))
