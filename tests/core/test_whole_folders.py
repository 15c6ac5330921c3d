"""Folders that are written: hashed meanwhile, whole or not there, errors told as what they are."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest
import torch

from dominie.core.errors import RunError
from dominie.core.io import file_manifest
from dominie.core.whole_folders import HashedFiles, writing


def test_hashes_are_those_of_the_files_as_they_end_up(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "early").write_bytes(os.urandom(3_000_000))
    (tmp_path / "sub" / "changed").write_bytes(b"before")
    (tmp_path / "gone").write_bytes(b"x")
    tensors = {"large": torch.randn(700_000), "small": torch.arange(5), "text": "kept"}
    with HashedFiles(tmp_path) as hashed:
        hashed.begin()
        (tmp_path / "sub" / "changed").write_bytes(b"afterwards")
        (tmp_path / "gone").unlink()
        with hashed.stream(tmp_path / "state.pt") as file:
            torch.save(tensors, file)
        (tmp_path / "late").write_bytes(b"late")
        found = hashed.manifest()
    assert found == file_manifest(tmp_path)
    assert set(found) == {"early", "late", "state.pt", "sub/changed"}
    read = torch.load(tmp_path / "state.pt", weights_only=True)
    assert read["text"] == "kept"
    assert torch.equal(read["large"], tensors["large"])


def test_bytes_may_be_changed_once_they_are_written(tmp_path):
    data, expected = bytearray(2**21), hashlib.sha256()
    with HashedFiles(tmp_path) as hashed:
        with hashed.stream(tmp_path / "file") as stream:
            for number in range(40):  # 80 MiB: the disk is asked to take them in, too
                data[:] = bytes([number]) * len(data)
                expected.update(data)
                assert stream.write(memoryview(data)) == len(data)
        assert hashed.manifest()["file"]["sha256"] == expected.hexdigest()


FULL = Path("/dev/full")


@pytest.mark.skipif(not FULL.exists(), reason="no device that is always full")
def test_a_disk_that_is_full_ends_the_stream(tmp_path, monkeypatch):
    from dominie.core import whole_folders

    monkeypatch.setattr(whole_folders, "create", lambda _: FULL.open("wb"))
    with (
        pytest.raises(RunError, match="No space left"),
        writing(tmp_path),
        HashedFiles(tmp_path) as hashed,
        hashed.stream(tmp_path / "state.pt") as file,
    ):
        torch.save({"large": torch.zeros(2**20)}, file)


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (OSError(28, "No space left on device"), RunError),
        (Exception("No space left on device (os error 28)"), RunError),
        (RuntimeError("PytorchStreamWriter failed writing file data/0"), RunError),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), RuntimeError),
        (ConnectionResetError("by peer"), ConnectionResetError),
        (ValueError("wrong"), ValueError),
        (KeyboardInterrupt(), KeyboardInterrupt),
    ],
)
def test_only_faults_of_writing_are_told_as_such(tmp_path, error, told):
    folder = tmp_path / "folder"
    folder.mkdir()
    with pytest.raises(told) as caught, writing(folder):
        raise error
    assert isinstance(error, KeyboardInterrupt) or not folder.exists()
    assert (caught.value is error) == (told is not RunError)
