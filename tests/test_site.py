"""The documentation as a site, built strictly; and its tour, run as it is written."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.full


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    pytest.importorskip("material", reason="needs the docs extra")
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "-d", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    return folder


def test_nothing_is_fetched_from_elsewhere(site):
    fetched = re.compile(r"""<(?:script|img|source|iframe)[^>]*src=["']?(?:https?:)?//""")
    styled = re.compile(r"""<link[^>]*rel=["']?(?:stylesheet|icon|preconnect)[^>]*//""")
    pages = list(site.glob("*.html"))
    assert len(pages) > 20
    for page in pages:
        html = page.read_text(encoding="utf-8")
        assert not fetched.search(html), page.name
        assert not styled.search(html), page.name


def test_formulas_are_mathml(site):
    html = (site / "method.html").read_text(encoding="utf-8")
    assert html.count("<math") > 20
    assert "arithmatex" not in html
    assert "<mfrac>" in html


def test_what_lies_outside_docs_is_there(site):
    assert (site / "contributing.html").is_file()
    assert "Unreleased" in (site / "changelog.html").read_text(encoding="utf-8")
    assert (site / "files" / "recipes" / "real-run.yaml.txt").is_file()


def shell_blocks(page: Path) -> list[str]:
    return re.findall(r"^```bash\n(.*?)^```", page.read_text(encoding="utf-8"), re.M | re.S)


@pytest.mark.timeout(2700)
def test_the_tour_runs_as_it_is_written(tmp_path):
    """Every block of the tour in one shell, in an empty folder, without a network."""
    blocks = shell_blocks(ROOT / "docs" / "tour.md")
    assert len(blocks) >= 8
    script = "set -eu\n" + "\n".join(blocks)
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    quiet = {"PATH": path, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [shutil.which("bash") or "bash", "-c", script],
        cwd=tmp_path,
        env={**os.environ, **quiet},
        capture_output=True,
        text=True,
        timeout=2600,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    run = tmp_path / "mine" / "runs"
    assert (run / "mine" / "report.html").is_file()
    assert (run / "half" / "results.json").is_file()
    assert (tmp_path / "mine" / "compare.html").is_file()
    assert "kept 600" in done.stdout + done.stderr
