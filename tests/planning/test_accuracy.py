"""Training needs what was planned, to within a tenth, and the page on scale is of today."""

from __future__ import annotations

import json
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.full
@pytest.mark.timeout(1200)
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from /proc")
def test_measured_memory_is_the_planned_one_within_a_tenth():
    command = [sys.executable, str(ROOT / "benchmarks" / "plan.py"), "--json", "--no-file"]
    said = subprocess.run(command, capture_output=True, text=True, check=True)
    lines = said.stdout.splitlines()  # DeepSpeed, where it is installed, speaks there too
    rows = [json.loads(line) for line in lines if line.startswith("{")]
    assert len(rows) >= 3
    for row in rows:
        assert row["measured_gb"] > 1.0, row
        assert row["planned_gb"] == pytest.approx(row["measured_gb"], rel=0.1), row


@pytest.mark.full
def test_the_page_on_scale_is_what_the_planner_prints():
    made = runpy.run_path(str(ROOT / "docs" / "scale.py"))
    assert (ROOT / "docs" / "scale.md").read_text(encoding="utf-8") == made["page"]()
