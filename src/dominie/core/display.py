"""Progress on a console: bars in a terminal, plain lines elsewhere."""

from __future__ import annotations

import codecs
import io
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from rich.console import Console, ConsoleOptions, RenderableType
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.segment import Segment

from dominie.core.errors import printable

T = TypeVar("T")

#: Seconds between lines of progress if the console is not a terminal.
PLAIN_INTERVAL = 15.0

Advance = Callable[[int, int | None, str], None]


#: Signs that a stream may lack, each by others that every stream has.
_SIGNS = str.maketrans(
    {"–": "-", "−": "-", "—": "-", "±": "+/-", "≈": "~", "…": "...", "→": "->", "·": "-"}
    | {"×": "x", "✓": "ok", "⟦": "[[", "⟧": "]]", "≤": "<=", "≥": ">=", "²": "^2", "─": "-"}
)
_HANDLER = "dominie.spelt_out"


def _spelt_out(error: UnicodeError) -> tuple[str, int]:
    """Replace what an encoding lacks: a handler of errors for `codecs`."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    spelt = error.object[error.start : error.end].translate(_SIGNS)
    return spelt.encode("ascii", "backslashreplace").decode("ascii"), error.end


codecs.register_error(_HANDLER, _spelt_out)


def print_everything(stream: object) -> None:
    """Have a stream spell out what its encoding lacks, where it would raise an error."""
    if isinstance(stream, io.TextIOWrapper) and stream.errors != _HANDLER:
        stream.reconfigure(errors=_HANDLER)


class PlainConsole(Console):
    """A console that shows texts of models, servers and files as they are, and obeys none.

    Control characters in them are written out; brackets and colons are no markup. Options are
    those of rich's console.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(highlight=False, soft_wrap=True, markup=False, emoji=False, **options)

    def render(
        self, renderable: RenderableType, options: ConsoleOptions | None = None
    ) -> Iterable[Segment]:
        """Render to segments of text, of which only the console's own control the terminal."""
        for segment in super().render(renderable, options):
            yield segment if segment.control else segment._replace(text=printable(segment.text))


class Display:
    """Prints lines and progress on one console, by default stdout."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or PlainConsole()
        print_everything(self.console.file)
        self._told: set[str] = set()

    def once(self, text: str) -> None:
        """Print a line, unless it has been printed so before."""
        if text not in self._told:
            self._told.add(text)
            self.line(text)

    def line(self, text: str) -> None:
        """Print one line without markup."""
        self.console.print(text, markup=False)

    def done(self, name: str, text: str) -> None:
        """Print one line about something that is done."""
        mark = "✓" if self.console.is_terminal else "done"
        self.console.print(mark, style="green", end=" ", markup=False)
        self.console.print(name, style="bold", end=" ", markup=False)
        self.console.print(text, markup=False)

    @contextmanager
    def progress(self, title: str) -> Iterator[Advance]:
        """Show a bar with the time left, which `advance(completed, total, note)` moves."""
        if not self.console.is_terminal:
            yield _PlainProgress(self, title)
            return
        with Progress(
            SpinnerColumn(),
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=30),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("ETA"),
            TimeRemainingColumn(compact=True),
            TextColumn("{task.fields[note]}", markup=False),
            console=self.console,
            transient=True,
        ) as bar:
            task = bar.add_task(title, total=None, note="")

            def advance(completed: int, total: int | None, note: str) -> None:
                bar.update(task, completed=completed, total=total, note=note)

            yield advance

    def track(self, items: Iterable[T], title: str, total: int) -> Iterator[T]:
        """Yield the items, and show progress."""
        with self.progress(title) as advance:
            for done, item in enumerate(items, start=1):
                yield item
                advance(done, total, "")


class _PlainProgress:
    """Prints a line of progress every `PLAIN_INTERVAL` seconds."""

    def __init__(self, display: Display, title: str) -> None:
        self.display, self.title = display, title
        self.started = self.printed = time.monotonic()
        self.first: int | None = None

    def __call__(self, completed: int, total: int | None, note: str) -> None:
        now = time.monotonic()
        self.first = completed if self.first is None else self.first
        if now - self.printed < PLAIN_INTERVAL:
            return
        self.printed = now
        if total is None:
            self.display.line(f"{self.title}: {completed:,}  {note}")
            return
        left = (total - completed) * (now - self.started) / max(completed - self.first, 1)
        self.display.line(f"{self.title}: {completed}/{total}, about {left:.0f} s left  {note}")
