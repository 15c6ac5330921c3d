"""Hashes of large files: by content, read once while nothing has touched the file."""

from __future__ import annotations

import hashlib
import os
import shutil
import time
from pathlib import Path

import pytest

from dominie.core import content_hash
from dominie.core.content_hash import content_hashes


@pytest.fixture
def reads(tmp_path, monkeypatch) -> list[Path]:
    """The files that were read; every file counts as large and as settled."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(content_hash, "LARGE", 1)
    monkeypatch.setattr(content_hash, "_TICK", -1.0)
    read, original = [], content_hash._hash

    def hashed(file: Path) -> str:
        read.append(file)
        return original(file)

    monkeypatch.setattr(content_hash, "_hash", hashed)
    return read


@pytest.fixture
def file(tmp_path) -> Path:
    path = tmp_path / "weights"
    path.write_bytes(b"some weights")
    return path


def test_a_file_is_read_once(reads, file):
    expected = hashlib.blake2b(b"some weights", digest_size=16).hexdigest()
    assert [content_hashes([file]) for _ in range(3)] == [[expected]] * 3
    assert reads == [file]


def test_a_copy_and_a_touched_file_are_the_same_content(reads, file, tmp_path):
    known = content_hashes([file])
    os.utime(file, (1, 1))
    copy = shutil.copy2(file, tmp_path / "copy")
    assert content_hashes([file]) == content_hashes([copy]) == known


def test_other_bytes_of_the_same_size_and_time_are_other_content(reads, file):
    known, times = content_hashes([file]), file.stat()
    time.sleep(0.02)  # longer than a file system's tick
    file.write_bytes(b"some weightz")
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert content_hashes([file]) != known


def test_a_file_that_has_just_changed_is_not_kept(reads, file, monkeypatch):
    monkeypatch.setattr(content_hash, "_TICK", 60.0)
    assert content_hashes([file]) == content_hashes([file])
    assert reads == [file, file]


@pytest.mark.parametrize("content", ["", "[]", "{", '{"a": "b", "checksum": "0"}'])
def test_a_damaged_cache_is_not_believed(reads, file, tmp_path, content):
    known = content_hashes([file])
    kept = tmp_path / "cache" / "dominie" / "hashes.json"
    assert kept.is_file()
    kept.write_text(content)
    assert content_hashes([file]) == known
    assert reads == [file, file]


def test_without_a_place_to_keep_them_files_are_read_again(reads, file, tmp_path, monkeypatch):
    (tmp_path / "cache").write_text("a file is in the way")
    assert content_hashes([file]) == content_hashes([file])
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", lambda: (_ for _ in ()).throw(RuntimeError("no home")))
    assert len(content_hashes([file, file])) == 2
