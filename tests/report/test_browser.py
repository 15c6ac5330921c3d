"""The report in a real browser: nothing on its console, every section drawn, in both themes."""

from __future__ import annotations

import importlib.util
import shutil
import struct
import subprocess
import zlib
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from run_folders import judged

from dominie.report import write_report

ROOT = Path(__file__).parents[2]
SECTIONS = (
    "results", "judged", "plane", "curves", "families", "samples", "stages", "data", "recipe"
)  # fmt: skip


def taker() -> Any:
    spec = importlib.util.spec_from_file_location("screenshot", ROOT / "docs" / "screenshot.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


screenshot = taker()
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
    """How many pixels there are of each colour: an 8-bit PNG without interlace, unfiltered."""
    data, chunks, header = picture.read_bytes()[8:], b"", (0, 0, 0, 0)
    while data:
        (length,), kind = struct.unpack(">I", data[:4]), data[4:8]
        if kind == b"IHDR":
            header = struct.unpack(">IIBB", data[8:18])
        if kind == b"IDAT":
            chunks += data[8 : 8 + length]
        data = data[12 + length :]
    wide, high, _, kind_of = header
    step = {2: 3, 6: 4}[kind_of]
    raw, above, found = zlib.decompress(chunks), bytearray(wide * step), Counter[bytes]()
    for y in range(high):
        at = y * (wide * step + 1)
        row = bytearray(raw[at + 1 : at + 1 + wide * step])
        unfilter(raw[at], row, above, step)
        found.update(bytes(row[x : x + 3]) for x in range(0, len(row), step))
        above = row
    return found


def unfilter(kind: int, row: bytearray, above: bytearray, step: int) -> None:
    """PNG's five filters (ISO 15948, section 9)."""
    for i in range(len(row)) if kind else ():
        left = row[i - step] if i >= step else 0
        corner = above[i - step] if i >= step else 0
        guess = left + above[i] - corner
        nearest = min((left, above[i], corner), key=lambda value: abs(guess - value))
        row[i] = (row[i] + (0, left, above[i], (left + above[i]) // 2, nearest)[kind]) % 256


def test_the_console_stays_empty_and_the_script_runs(report, tmp_path):
    command = [screenshot.browser(), *screenshot.QUIET, f"--user-data-dir={tmp_path}"]
    command += ["--enable-logging=stderr", "--dump-dom", f"{report.as_uri()}?theme=dark"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert "CONSOLE" not in done.stderr, done.stderr
    assert '<html lang="en" data-theme="dark">' in done.stdout
    assert ">Light</button>" in done.stdout, "the script named the other theme"
    for section in SECTIONS:
        assert f'<section id="{section}"' in done.stdout


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_every_section_is_drawn_on_the_theme_s_paper(report, tmp_path, theme):
    html, ink = report.read_text(encoding="utf-8"), {}
    for section in ("", *SECTIONS):  # one at a time, and first none: the frame of the page
        others = ", ".join(f"#{name}" for name in SECTIONS if name != section)
        page, picture = tmp_path / f"{section}.html", tmp_path / f"{section}.png"
        page.write_text(html.replace("</style>", f"{others}, .opening {{ display: none }}</style>"))
        screenshot.take_picture(page, picture, theme=theme, size=(1000, 500), scale=0.5)
        found = colours(picture)
        paper, count = found.most_common(1)[0]
        assert (sum(paper) > 600) == (theme == "light"), section
        ink[section] = 1 - count / found.total()
    for section in SECTIONS:
        assert ink[section] > ink[""] + 0.01, (section, ink)
