"""Progress as plain lines, and as a bar in a terminal."""

from __future__ import annotations

import io
import re

import pytest
from rich.console import Console

from dominie.core import display as module
from dominie.core.display import Display


@pytest.fixture
def clock(monkeypatch) -> list[float]:
    """The time that the display reads."""
    now = [0.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    return now


def test_plain_progress_is_a_line_now_and_then(clock):
    out = io.StringIO()
    display = Display(Console(file=out, width=200))
    with display.progress("train") as advance:
        for step in range(10, 40):  # resumed at step 10, a step in 2 s
            advance(step, 40, "loss 1.5")
            clock[0] += 2.0
    lines = out.getvalue().splitlines()
    assert lines[0] == "train: 18/40, about 44 s left  loss 1.5"
    assert len(lines) == 3


def test_plain_progress_without_an_end(clock):
    out = io.StringIO()
    with Display(Console(file=out, width=200)).progress("read") as advance:
        clock[0] = 20.0
        advance(12345, None, "")
    assert out.getvalue().strip() == "read: 12,345"


def test_a_terminal_gets_a_bar_and_markup_is_printed_as_it_is():
    out = io.StringIO()
    display = Display(Console(file=out, width=100, force_terminal=True, highlight=False))
    assert list(display.track("abc", "items", total=3)) == ["a", "b", "c"]
    display.line("[bold]")
    display.done("align", "[x]")
    text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", out.getvalue())
    assert "items" in text
    assert "3/3" in text
    assert "[bold]" in text
    assert "✓" in text
    assert "[x]" in text
