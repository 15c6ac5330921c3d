"""Progress as plain lines, and as a bar in a terminal."""

from __future__ import annotations

import importlib
import io
import re

import pytest
from rich.console import Console
from rich.table import Table
from rich.text import Text

from dominie.core import display as module
from dominie.core.display import Display, PlainConsole
from dominie.core.errors import InputError


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


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252", "utf-8"])
def test_a_stream_spells_out_what_its_encoding_lacks(encoding):
    out = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    display = Display(Console(file=out, width=200))
    text = "≈ 3 − 1 ± 2, Größe, 東, \ud83d"
    display.line(text)
    display.done("s", "4 → 5")
    table = Table("model", "≈")
    table.add_row("a", "0.0–52.7")
    display.console.print(table)
    out.flush()
    shown = out.buffer.getvalue().decode(encoding)
    whole = {
        "ascii": r"~ 3 - 1 +/- 2, Gr\xf6\xdfe, \u6771, \ud83d",
        "latin-1": r"~ 3 - 1 ± 2, Größe, \u6771, \ud83d",
        "cp1252": r"~ 3 - 1 ± 2, Größe, \u6771, \ud83d",
        "utf-8": r"≈ 3 − 1 ± 2, Größe, 東, \ud83d",
    }
    assert shown.splitlines()[0] == whole[encoding]
    assert ("4 -> 5" in shown) is (encoding != "utf-8")


def test_the_command_line_prints_to_any_stream(monkeypatch):
    entry_point = importlib.import_module("dominie.cli.main")
    streams = [io.TextIOWrapper(io.BytesIO(), encoding="ascii") for _ in range(2)]
    monkeypatch.setattr("sys.stdout", streams[0])
    monkeypatch.setattr("sys.stderr", streams[1])
    monkeypatch.setattr(entry_point, "stop_with_launcher", lambda: None)
    monkeypatch.setattr("signal.signal", lambda *_: None)

    def app(**_: object) -> None:
        print("größe ≈ 2")
        raise InputError("größe", where="r.yaml")

    monkeypatch.setattr(entry_point, "app", app)
    with pytest.raises(SystemExit) as ended:
        entry_point.main()
    assert ended.value.code == 2
    for stream, printed in zip(
        streams, (rb"gr\xf6\xdfe ~ 2", rb"r.yaml: gr\xf6\xdfe"), strict=True
    ):
        stream.flush()
        assert printed in stream.buffer.getvalue()


HOSTILE = "a\x1b]0;title\x07b\x1b[2Jc\rd\x9b1md [red]e[/red] :smile: é 你 \t."
SHOWN = "a\\x1b]0;titleb\\x1b[2Jcd\\x9b1md [red]e[/red] :smile: é 你"


@pytest.mark.parametrize("terminal", [False, True])
def test_a_terminal_obeys_no_text_of_others(terminal):
    out = io.StringIO()
    console = PlainConsole(file=out, width=500, force_terminal=terminal, color_system=None)
    display = Display(console)
    table = Table(HOSTILE)
    table.add_row(Text(HOSTILE))
    for show in (display.line, console.print, lambda text: display.done("s", text)):
        show(HOSTILE)
    console.print(table)
    said = out.getvalue()
    assert said.count(SHOWN) == 3
    assert said.count("\\x1b[2J") == 5
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", re.sub(r"\x1b\[[0-9;]*m", "", said))


def test_an_error_shows_control_characters_and_keeps_its_lines():
    error = InputError("it is wrong", where="m\x1b[31m", found="two\nlines\x00")
    assert str(error) == "m\\x1b[31m: it is wrong\n  found     two\nlines\\x00"
