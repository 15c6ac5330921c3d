"""One process at a time, and a message that says which."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
import subprocess
import time

import psutil
import pytest

from dominie.core.errors import InputError
from dominie.core.io import exclusive_lock


def own() -> dict[str, object]:
    """What this process signs with, two hours ago."""
    return {
        "pid": os.getpid(),
        "host": socket.gethostname(),
        "started": psutil.Process().create_time(),
        "since": time.time() - 7200,
    }


@pytest.fixture
def no_locks(monkeypatch):
    """A file system that has none."""

    def refuse(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)


def test_the_owner_is_named_and_signs_off(tmp_path):
    lock = tmp_path / ".lock"
    with exclusive_lock(lock):
        with pytest.raises(InputError) as refused, exclusive_lock(lock):
            pass
        said = str(refused.value)
        assert f"process {os.getpid()} on {socket.gethostname()}, for 0 s" in said
        assert "another dominie is at work" in said
    assert lock.read_text() == ""
    with exclusive_lock(lock):
        pass


def test_what_a_killed_process_left_is_taken_over(tmp_path):
    lock = tmp_path / ".lock"
    mine = own()
    lock.write_text(json.dumps(mine))
    with exclusive_lock(lock):  # signed by a process that lives, and held by none
        assert json.loads(lock.read_text())["since"] > mine["since"]


@pytest.mark.parametrize(
    ("changed", "taken"),
    [
        ({}, True),
        ({"started": 1.0}, False),  # its number is another's now
        ({"pid": 2**22 + 1}, False),
        ({"host": "elsewhere"}, True),
    ],
)
def test_without_locks_the_owner_counts_while_it_lives(no_locks, tmp_path, changed, taken):
    lock = tmp_path / ".lock"
    lock.write_text(json.dumps(own() | changed))
    if not taken:
        with exclusive_lock(lock):
            pass
        return
    with pytest.raises(InputError) as refused, exclusive_lock(lock):
        pass
    assert "for 120 min" in str(refused.value) or "for 2.0 h" in str(refused.value)
    assert f"remove {lock}" in str(refused.value)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"pid": "x"}', '{"pid": 1}'])
def test_an_owner_that_cannot_be_read_owns_nothing(no_locks, tmp_path, text):
    (tmp_path / ".lock").write_text(text)
    with exclusive_lock(tmp_path / ".lock"):
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
