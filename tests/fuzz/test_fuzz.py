"""Readers of what others wrote, given anything: an error of ours, or none."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).parent))  # importlib mode puts no folder on the path

from targets import SEEDS, TARGETS

FEW, MANY = 150, 10_000
SLOWER = {"recipe": 50, "rendering": 40, "tokenizer": 40, "generation": 40}
"""Targets with a child process or a model, and how many inputs the fast suite has of each."""
SECONDS = 15.0
"""Of processor time for one input of at most 8 KiB."""
PIECES = [
    b"{",
    b"}",
    b"[",
    b"]",
    b'"',
    b"\\",
    b":",
    b"\0",
    b"\xff",
    b"\n",
    b"null",
    b"1e999",
    b"-1",
]
PIECES += [b"{{", b"{%", b"%}", b"}}", b"[[", b"]]", b"&a", b"*a", b"!!", b"<<: ", b"\xed\xa0\x80"]

pieces = st.sampled_from(PIECES) | st.binary(max_size=6)
edits = st.lists(
    st.tuples(st.floats(0, 1), st.sampled_from(["insert", "replace", "cut", "repeat"]), pieces),
    max_size=8,
)


def edited(seed: bytes, changes: list[tuple[float, str, bytes]]) -> bytes:
    """An input that is valid but for some changes."""
    data = bytearray(seed)
    for where, how, piece in changes:
        at = int(where * len(data))
        if how == "insert":
            data[at:at] = piece
        elif how == "replace":
            data[at : at + len(piece)] = piece
        elif how == "cut":
            del data[at : at + 1 + 4 * len(piece)]
        else:
            data[at:at] = data[at : at + 40] * (1 + len(piece))
    return bytes(data[:8192])


def run(name: str, data: bytes) -> None:
    begun = time.process_time()
    TARGETS[name](data)
    assert time.process_time() - begun < SECONDS


def check(name: str, inputs: int) -> None:
    anything = st.binary(max_size=200) | st.text(max_size=200).map(str.encode)
    near = st.builds(edited, st.sampled_from(SEEDS[name]), edits)

    @settings(
        max_examples=inputs,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(st.one_of(near, near, near, anything))
    def whatever(data: bytes) -> None:
        run(name, data)

    whatever()


@pytest.mark.parametrize("name", TARGETS)
def test_whatever_comes_the_error_is_ours(name):
    for seed in SEEDS[name]:
        run(name, seed)
    check(name, SLOWER.get(name, FEW))


@pytest.mark.full
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", TARGETS)
def test_whatever_comes_in_ten_thousands(name):
    check(name, MANY)


@pytest.mark.full
@pytest.mark.timeout(1800)
@pytest.mark.skipif(importlib.util.find_spec("atheris") is None, reason="needs atheris")
@pytest.mark.parametrize("name", TARGETS)
def test_inputs_that_are_steered_to_new_branches(name, tmp_path):
    script = Path(__file__).with_name("guided.py")
    command = [sys.executable, str(script), name, str(MANY), str(tmp_path / "guided")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert f"Done {MANY} " in done.stderr, done.stderr[-3000:]
