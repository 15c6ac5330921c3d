"""Atomic writes, checksums, manifests, and locks whose message names the owner."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
import subprocess
import sys
import time

import pytest

from dominie.core.errors import InputError
from dominie.core.io import (
    empty_folder,
    exclusive_lock,
    file_manifest,
    manifest_error,
    open_append,
    read_checksummed,
    write_atomic,
    write_checksummed,
)


@pytest.fixture(params=[errno.ENOLCK, errno.ENOSYS])
def no_locks(request, monkeypatch):
    """A file system that has none."""

    def refuse(*_):
        raise OSError(request.param, os.strerror(request.param))

    monkeypatch.setattr(fcntl, "flock", refuse)


def check_refusal_names_us(path):
    with pytest.raises(InputError) as refused, exclusive_lock(path):
        pass
    assert "another dominie is at work" in str(refused.value)
    assert f"process {os.getpid()} on {socket.gethostname()}, for 0 s" in str(refused.value)


def test_the_owner_is_named_until_it_is_done(tmp_path):
    lock = tmp_path / ".lock"
    with exclusive_lock(lock):
        check_refusal_names_us(lock)
    with exclusive_lock(lock):
        pass


def test_a_lock_goes_with_its_process(tmp_path):
    lock = tmp_path / ".lock"
    code = (
        "import pathlib, time, sys\nfrom dominie.core.io import exclusive_lock\n"
        "with exclusive_lock(pathlib.Path(sys.argv[1])):\n  print('held', flush=True)\n"
        "  time.sleep(60)"
    )
    owner = subprocess.Popen([sys.executable, "-c", code, lock], stdout=subprocess.PIPE)
    assert owner.stdout.readline() == b"held\n"
    os.utime(lock, (time.time() - 7200,) * 2)
    with pytest.raises(InputError) as refused, exclusive_lock(lock):
        pass
    assert f"process {owner.pid} on {socket.gethostname()}, for 2.0 h" in str(refused.value)
    assert "remove" not in str(refused.value), "it ends with its process"
    owner.kill()
    owner.communicate()
    assert lock.read_text()
    with exclusive_lock(lock):
        check_refusal_names_us(lock)


@pytest.mark.parametrize("text", ["", "{", "1\n", '{"pid": 1}', "\0\n\0"])
def test_a_lock_file_that_cannot_be_read_locks_nothing(tmp_path, text):
    (tmp_path / ".lock").write_text(text)
    with exclusive_lock(tmp_path / ".lock"):
        check_refusal_names_us(tmp_path / ".lock")


def test_a_holder_that_does_not_say_who_it_is(tmp_path):
    with (tmp_path / ".lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(InputError) as refused, exclusive_lock(tmp_path / ".lock"):
            pass
    assert "found" not in str(refused.value)


def test_without_flock_the_owner_is_named_until_it_is_done(no_locks, tmp_path):
    lock = tmp_path / ".lock"
    lock.touch()  # as an earlier run may have left it
    with exclusive_lock(lock):
        check_refusal_names_us(lock)
    with exclusive_lock(lock):
        pass


@pytest.mark.parametrize(
    ("pid", "host", "held"),
    [
        (os.getpid(), socket.gethostname(), True),
        (2**22 + 1, socket.gethostname(), False),
        (os.getpid(), "elsewhere", True),
    ],
    ids=["alive", "gone", "elsewhere"],  # both workers of a run have to find the same names
)
def test_without_flock_the_owner_counts_while_it_lives(no_locks, tmp_path, pid, host, held):
    owner = tmp_path / ".lock.owner"
    owner.write_text(f"{pid}\n{host}\n")
    if not held:
        with exclusive_lock(tmp_path / ".lock"):
            pass
        return
    with pytest.raises(InputError) as refused, exclusive_lock(tmp_path / ".lock"):
        pass
    assert f"process {pid} on {host}" in str(refused.value)
    assert (f"remove {owner}" in str(refused.value)) == (host == "elsewhere")


def test_a_folder_that_cannot_be_written_is_no_lock_taken(tmp_path):
    (tmp_path / "none").touch()
    with pytest.raises(OSError, match="none"), exclusive_lock(tmp_path / "none" / ".lock"):
        pass


def test_children_do_not_inherit_it(tmp_path):
    with exclusive_lock(tmp_path / ".lock"):
        child = subprocess.Popen(["sleep", "30"])
    try:
        with exclusive_lock(tmp_path / ".lock"):
            pass
    finally:
        child.kill()
        child.wait()


def test_a_write_that_fails_leaves_the_old_text(tmp_path, monkeypatch):
    path = tmp_path / "a.txt"
    write_atomic(path, "old")

    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space"):
            write_atomic(path, "new")
    assert path.read_text() == "old"


def test_a_checksum_notices_a_changed_value(tmp_path):
    path = tmp_path / "a.json"
    write_checksummed(path, {"b": [1.5, None], "a": {"x": "é"}})
    assert read_checksummed(path) == {"b": [1.5, None], "a": {"x": "é"}}
    path.write_text(path.read_text().replace("1.5", "1.6"))
    with pytest.raises(ValueError, match="checksum"):
        read_checksummed(path)
    path.write_text('{"a": 1}')  # from before there were checksums
    assert read_checksummed(path) == {"a": 1}
    path.write_text("[]")
    with pytest.raises(ValueError, match="no JSON object"):
        read_checksummed(path)


def test_a_manifest_names_the_first_file_that_differs(tmp_path):
    (tmp_path / "in").mkdir()
    for name in ("a", "in/b"):
        (tmp_path / name).write_text(name)
    files = json.loads(json.dumps(file_manifest(tmp_path)))
    assert list(files) == ["a", "in/b"]
    assert manifest_error(tmp_path, files) is None
    assert list(file_manifest(tmp_path, [tmp_path / "in" / "b"])) == ["in/b"]
    (tmp_path / "in" / "b").write_text("in/c")
    assert manifest_error(tmp_path, files, hashes=False) is None
    assert "in/b is not as it was written" in str(manifest_error(tmp_path, files))
    (tmp_path / "in" / "b").write_text("longer")
    assert "in/b is 6 bytes of 4" in str(manifest_error(tmp_path, files, hashes=False))
    (tmp_path / "a").unlink()
    assert "a is missing" in str(manifest_error(tmp_path, files))
    with pytest.raises(ValueError, match="leads out"):
        manifest_error(tmp_path, {"../a": {"size": 1, "sha256": ""}})


@pytest.fixture
def victim(tmp_path):
    """A file outside of the folder that is written."""
    path = tmp_path / "victim"
    path.write_text("not yours")
    yield path
    assert path.read_text() == "not yours"


def test_nothing_is_written_through_a_link(victim, tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    for name in (".results.json", "results.json", "metrics.jsonl", ".lock", "gone.jsonl"):
        (folder / name).symlink_to(victim if name != "gone.jsonl" else tmp_path / "nowhere")
    write_atomic(folder / "results.json", "ours")
    assert (folder / "results.json").read_text() == "ours"
    for name in ("metrics.jsonl", "gone.jsonl"):
        with pytest.raises(InputError, match=r"(?s)symbolic link.*remove it"):
            open_append(folder / name)
    with pytest.raises(InputError, match="symbolic link"), exclusive_lock(folder / ".lock"):
        pass
    assert not (tmp_path / "nowhere").exists()


def test_a_folder_is_not_emptied_through_a_link(victim, tmp_path):
    (tmp_path / "scratch").symlink_to(tmp_path)
    empty_folder(tmp_path / "scratch")
    assert list((tmp_path / "scratch").iterdir()) == []
    assert not (tmp_path / "scratch").is_symlink()


def test_a_file_is_as_private_as_the_umask_says(tmp_path):
    before = os.umask(0o077)
    try:
        write_atomic(tmp_path / "a", "text")
    finally:
        os.umask(before)
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o600
