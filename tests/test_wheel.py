"""Wheel and sdist hold everything: installed apart from the source, dominie runs."""

from __future__ import annotations

import subprocess
import sys
import tarfile
import zipfile
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


def test_the_sdist_makes_the_same_wheel_and_it_holds_every_file(tmp_path: Path):
    pytest.importorskip("hatchling", reason="builds the sdist; pip install -e '.[full]'")
    hatch = [sys.executable, "-m", "hatchling", "build", "-d", str(tmp_path)]
    subprocess.run([*hatch, "-t", "sdist", "-t", "wheel"], check=True, cwd=ROOT)
    (sdist,) = tmp_path.glob("dominie-*.tar.gz")
    with tarfile.open(sdist) as packed:
        packed.extractall(tmp_path / "unpacked", filter="data")
    (source,) = (tmp_path / "unpacked").iterdir()
    for name in ("README.md", "LICENSE", "CITATION.cff", "CHANGELOG.md", "tests/test_wheel.py"):
        assert (source / name).is_file(), name
    again = tmp_path / "again"
    subprocess.run(
        [*hatch[:4], "-d", str(again), "-t", "wheel"], check=True, cwd=source, capture_output=True
    )
    (first,), (second,) = tmp_path.glob("*.whl"), again.glob("*.whl")
    with zipfile.ZipFile(first) as one, zipfile.ZipFile(second) as two:
        held = set(one.namelist())
        assert held == set(two.namelist())
        described = next(n for n in held if n.endswith("METADATA"))
        assert "License-Expression: Apache-2.0" in one.read(described).decode()
    package = ROOT / "src"
    wanted = {
        path.relative_to(package).as_posix()
        for path in (package / "dominie").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    wanted |= {f"dominie/configs/{path.name}" for path in ROOT.glob("recipes/configs/*.json")}
    assert wanted <= held
