"""What `benchmarks/gpu.sh` runs can run where little is installed, and ends within its time."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BARE = Path(__file__).parent / "bare_machine.py"
SCRIPT = (ROOT / "benchmarks" / "gpu.sh").read_text()
BENCHMARKS = re.findall(r"python (benchmarks/\w+\.py) --seconds", SCRIPT)


def on_a_bare_machine(*arguments, timeout=250):
    """What is printed there, line by line."""
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "PYTHONPATH": str(ROOT / "src"),
    }
    done = subprocess.run(
        [sys.executable, str(BARE), *arguments],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_the_parts_add_up_to_less_than_eight_minutes_and_stop_themselves_before():
    parts = [line for line in SCRIPT.splitlines() if line.startswith("timeout ")]
    limits = [int(line.split()[1]) for line in parts]
    assert len(parts) == 4
    assert sum(limits) < 480
    stops = [int(n) for n in re.findall(r"(?:--seconds |--session-timeout=)(\d+)", SCRIPT)]
    assert sorted(stops) != []
    for own, limit in zip(sorted(stops), sorted(limits), strict=True):
        assert own + 10 < limit


def test_nothing_is_imported_that_a_bare_machine_lacks():
    assert len(BENCHMARKS) == 3
    on_a_bare_machine(",".join(BENCHMARKS))


@pytest.mark.full
@pytest.mark.parametrize("script", [each for each in BENCHMARKS if "geometry" not in each])
def test_the_quick_path_runs_on_a_bare_machine(script):
    rows = [json.loads(line) for line in on_a_bare_machine(script, "--quick", "--json")]
    assert rows


@pytest.mark.full
def test_every_job_of_the_geometry_runs_and_plain_code_computes_the_same_loss():
    rows = [
        json.loads(line)
        for line in on_a_bare_machine("benchmarks/geometry.py", "--quick", "--json")
        if line.startswith("{")
    ]
    assert [(row["job"], row["method"]) for row in rows] == [
        *((job, method)
          for job in ("KD + attention", "KD", "DAE online", "DAE from cache")
          for method in ("dominie", "plain")),
        ("KD + attention, packed", "dominie"),
    ]  # fmt: skip
    for ours, plain in zip(rows[0:6:2], rows[1:6:2], strict=True):
        assert plain["loss"] == pytest.approx(ours["loss"], rel=0.01), ours["job"]
    if find_spec("pyarrow") is not None:
        assert not [row["note"] for row in rows if row["note"]]
        assert all(row["steps"] and row["tokens_per_second"] > 0 for row in rows)
