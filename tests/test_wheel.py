"""The wheel holds everything: installed apart from the source, it runs and writes a report."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.full, pytest.mark.timeout(900)]

ROOT = Path(__file__).parents[1]


def test_the_wheel_installs_and_runs_away_from_its_source(tmp_path: Path):
    pytest.importorskip("hatchling", reason="builds the wheel; pip install -e '.[full]'")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q"]
    wheels = tmp_path / "wheels"
    build = ["wheel", "--no-deps", "--no-build-isolation", "-w", str(wheels), str(ROOT)]
    subprocess.run([*pip, *build], check=True)
    (wheel,) = wheels.glob("dominie-*.whl")
    home = tmp_path / "home"
    subprocess.run([*pip, "install", "--no-deps", "--target", str(home), str(wheel)], check=True)
    assert (home / "dominie" / "py.typed").exists()
    # Isolated from the source: the installed copy comes first, and says so.
    code = (
        "import sys; sys.path.insert(0, sys.argv.pop(1))\n"
        "import dominie, dominie.cli\n"
        "assert 'home' in dominie.__file__, dominie.__file__\n"
        "dominie.cli.main()\n"
    )
    recipe = ROOT / "tests" / "recipes" / "mini.yaml"
    run = [sys.executable, "-c", code, str(home), "run", str(recipe)]
    subprocess.run(run, check=True, cwd=tmp_path, timeout=600)
    assert (tmp_path / "runs" / "mini" / "report.html").stat().st_size > 10_000
