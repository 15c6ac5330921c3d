"""Shows a chat: columns in a terminal for several models, plain lines elsewhere."""

from __future__ import annotations

import contextlib
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from dominie.core.errors import InputError

#: Shows a piece of an answer.
OnPiece = Callable[[str], None]


def typed_lines(console: Console, prompt: str = "> ") -> Iterator[str]:
    """Yield what is typed or piped in, line by line.

    Raises:
        InputError: what is piped in has another encoding than stdin.
    """
    if not (sys.stdin.isatty() and console.is_terminal):
        try:
            yield from sys.stdin
        except UnicodeDecodeError as error:
            raise InputError(
                "the questions cannot be read",
                where="stdin",
                expected=f"text in {error.encoding}",
                found=error.reason,
                do="set PYTHONIOENCODING=utf-8, or the encoding that they have",
            ) from None
        return
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401 - editing and history
    while True:
        try:
            yield console.input(prompt)
        except (EOFError, KeyboardInterrupt):
            console.print()
            return


class Screen(ABC):
    """Shows answers as they are generated."""

    def __init__(self, console: Console) -> None:
        self.console = console

    def line(self, text: str) -> None:
        """Show a line that is not an answer."""
        self.console.print(text, markup=False, style="dim")

    @abstractmethod
    def answers(self, names: Sequence[str]) -> contextlib.AbstractContextManager[Sequence[OnPiece]]:
        """Within, give a function for each name that shows its answer piece by piece."""


class PlainScreen(Screen):
    """Shows answers as lines, each after its model's name if there are several."""

    @contextlib.contextmanager
    def answers(self, names: Sequence[str]) -> Iterator[Sequence[OnPiece]]:
        """Give functions that show answers one after the other."""
        begun: list[str] = []

        def shown(name: str) -> OnPiece:
            def piece(text: str) -> None:
                if name not in begun:
                    self._end(begun)
                    begun.append(name)
                    if len(names) > 1:
                        self.console.print(f"{name}: ", end="", markup=False, style="bold")
                self.console.print(text, end="", markup=False)

            return piece

        try:
            yield [shown(name) for name in names]
        finally:
            self._end(begun)

    def _end(self, begun: Sequence[str]) -> None:
        if begun:
            self.console.print()


class Columns(Screen):
    """Shows answers side by side, a column for each model."""

    @contextlib.contextmanager
    def answers(self, names: Sequence[str]) -> Iterator[Sequence[OnPiece]]:
        """Give functions that add to columns."""
        cells = [Text() for _ in names]

        def table() -> Table:
            drawn = Table(expand=True, show_edge=False, pad_edge=False)
            for name in names:
                drawn.add_column(Text(name), ratio=1, overflow="fold")
            drawn.add_row(*cells)
            return drawn

        with Live(console=self.console, get_renderable=table, refresh_per_second=8) as live:

            def shown(cell: Text) -> OnPiece:
                def piece(text: str) -> None:
                    cell.append(text)
                    live.refresh()

                return piece

            yield [shown(cell) for cell in cells]


def screen(console: Console, *, several: bool) -> Screen:
    """Return the screen that suits the console."""
    return Columns(console) if several and console.is_terminal else PlainScreen(console)
