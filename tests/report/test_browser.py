"""The report in a real browser: nothing on its console, every section drawn, in both themes."""

from __future__ import annotations

import html as html_module
import importlib
import json
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from run_folders import judged

from dominie.report import write_report

ROOT = Path(__file__).parents[2]
SECTIONS = (
    "opening", "results", "judged", "curves", "families", "samples", "stages", "data", "recipe"
)  # fmt: skip


sys.path.insert(0, str(ROOT / "docs"))
screenshot = importlib.import_module("screenshot")
small_png = importlib.import_module("small_png")
pytestmark = [
    pytest.mark.full,
    pytest.mark.skipif(
        not any(shutil.which(name) for name in screenshot.BROWSERS), reason="no Chromium here"
    ),
]


@pytest.fixture(scope="module")
def report(tmp_path_factory) -> Path:
    return write_report(judged(tmp_path_factory.mktemp("runs")))


def colours(picture: Path) -> Counter[bytes]:
    """How many pixels there are of each colour."""
    pixels = small_png.read_pixels(picture).reshape(-1, 3)
    found, counts = np.unique(pixels, axis=0, return_counts=True)
    return Counter({bytes(c): int(n) for c, n in zip(found, counts, strict=True)})


def test_the_console_stays_empty_and_the_script_runs(report, tmp_path):
    command = [screenshot.browser(), *screenshot.QUIET, f"--user-data-dir={tmp_path}"]
    command += ["--enable-logging=stderr", "--dump-dom", f"{report.as_uri()}?theme=dark"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert "CONSOLE" not in done.stderr, done.stderr
    assert '<html lang="en" data-theme="dark">' in done.stdout
    assert ">Light</button>" in done.stdout, "the script named the other theme"
    for section in SECTIONS:
        assert f'<section id="{section}"' in done.stdout


_KEYS = """
const figure = document.querySelector("#curves figure"), chart = figure.querySelector("svg");
const shown = () => [...figure.querySelectorAll(".last, .step")].map((each) => each.textContent);
const key = (name) => chart.dispatchEvent(new KeyboardEvent("keydown", { key: name }));
const seen = [shown()];
for (const name of ["Home", "ArrowRight", "Escape"]) { key(name); seen.push(shown()); }
document.title = JSON.stringify([chart.tabIndex, ...seen]);
"""


def test_curves_are_read_with_the_arrow_keys(report, tmp_path):
    html = re.sub(r"<meta http-equiv[^>]*>", "", report.read_text(encoding="utf-8"))
    page = tmp_path / "page.html"
    page.write_text(html.replace("</body>", f"<script>{_KEYS}</script></body>"), encoding="utf-8")
    command = [screenshot.browser(), *screenshot.QUIET, f"--user-data-dir={tmp_path}/profile"]
    command += ["--dump-dom", page.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    title = re.search(r"<title>(.*?)</title>", done.stdout)
    assert title is not None
    tab, rest, first, second, last = json.loads(html_module.unescape(title[1]))
    assert tab == 0
    assert first[0].startswith("step ")
    assert float(first[1]) > float(rest[1]), "a loss falls"
    assert second[0] != first[0]
    assert last == rest, "the keyboard can leave as well"


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_every_section_is_drawn_on_the_theme_s_paper(report, tmp_path, theme):
    html, ink = report.read_text(encoding="utf-8"), {}
    for section in ("", *SECTIONS):  # one at a time, and first none: the frame of the page
        others = ", ".join(f"#{name}" for name in SECTIONS if name != section)
        page, picture = tmp_path / f"{section}.html", tmp_path / f"{section}.png"
        page.write_text(html.replace("</style>", f"{others} {{ display: none }}</style>"))
        screenshot.take_picture(page, picture, theme=theme, size=(1000, 500), scale=0.5)
        found = colours(picture)
        paper, count = found.most_common(1)[0]
        assert (sum(paper) > 600) == (theme == "light"), section
        ink[section] = 1 - count / found.total()
    for section in SECTIONS:
        assert ink[section] > ink[""] + 0.01, (section, ink)


_WIDTH = """
const root = document.documentElement;
document.title = JSON.stringify([root.scrollWidth, root.clientWidth]);
"""


@pytest.mark.parametrize("width", [1280, 600])
def test_a_table_of_many_tasks_scrolls_and_leaves_the_page_as_wide_as_its_window(tmp_path, width):
    run = judged(tmp_path / "runs")
    results = json.loads((run / "results.json").read_text())
    for scores in results.values():
        scores |= {f"task {i}": {**scores["general"], "cut": 0.1, "empty": 0.2} for i in range(5)}
    (run / "results.json").write_text(json.dumps(results))
    html = re.sub(r"<meta http-equiv[^>]*>", "", write_report(run).read_text(encoding="utf-8"))
    page = tmp_path / "page.html"
    page.write_text(html.replace("</body>", f"<script>{_WIDTH}</script></body>"), encoding="utf-8")
    command = [screenshot.browser(), *screenshot.QUIET, f"--user-data-dir={tmp_path}/profile"]
    command += [f"--window-size={width},900", "--dump-dom", page.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    title = re.search(r"<title>(.*?)</title>", done.stdout)
    assert title is not None
    needed, there = json.loads(html_module.unescape(title[1]))
    assert needed <= there
