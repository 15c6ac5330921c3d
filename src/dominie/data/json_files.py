"""JSON Lines and JSON files, one row at a time and with line numbers."""

from __future__ import annotations

import codecs
import json
import re
from typing import IO, TYPE_CHECKING, Any

from dominie.core.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

MAX_ROW_BYTES = 64 * 2**20
"""A longer row is no conversation, and reading it whole would cost what streaming saves."""

_SPACE = re.compile(r"[ \t\r\n]*")
# A number, a word or an escape cut by the end of a chunk fails at most this far from that end.
_LONGEST_CUT = 16


def jsonl_rows(path: Path) -> Iterator[tuple[int, Any | InputError]]:
    """The rows of a JSON Lines file as (line number, value); a bad line yields its InputError.

    Blank lines are skipped. Memory is bounded by the longest line.
    """
    with path.open("rb") as file:
        number = 0
        while raw := file.readline(MAX_ROW_BYTES + 1):
            number += 1
            where = f"{path}:{number}"
            if len(raw) > MAX_ROW_BYTES:
                yield number, _too_large(where)
                return
            if number == 1:
                raw = raw.removeprefix(codecs.BOM_UTF8)
            if not raw.strip():
                continue
            try:
                # RecursionError: nested too deeply. Plain ValueError: a number of too many digits.
                yield number, json.loads(raw.decode("utf-8"))
            except UnicodeDecodeError as error:
                yield number, _not_utf8(where, raw[error.start], error.start)
            except (ValueError, RecursionError) as error:
                yield number, _malformed(where, error)


def json_rows(path: Path, chunk_size: int = 2**20) -> Iterator[tuple[int, Any | InputError]]:
    """The rows of a JSON file as (line number, value), an array of rows or rows one after another.

    The file is decoded piece by piece, so that memory is bounded by the longest row. After a
    malformed row nothing can be trusted: its InputError is the last thing yielded.

    Args:
        path: the file.
        chunk_size: bytes read at a time.
    """
    with path.open("rb") as file:
        window = _Window(file, path, chunk_size)
        try:
            if window.next_character() == "[":
                yield from _array_rows(window)
            else:
                while window.next_character():
                    yield window.decoded_row()
        except InputError as error:
            yield window.line, error


def _array_rows(window: _Window) -> Iterator[tuple[int, Any]]:
    """The rows from an opening bracket to its closing one, which has to end the file."""
    window.advance(1)
    separator = "]" if window.next_character() == "]" else ","
    while separator == ",":
        yield window.decoded_row()
        separator = window.next_character()
        if separator == ",":
            window.advance(1)
        elif separator != "]":
            raise window.fault(
                "malformed JSON" if separator else "the array is broken off",
                expected="a comma or the closing ]",
                found=window.excerpt(),
            )
    window.advance(1)
    if window.next_character():
        raise window.fault(
            "there is more after the end of the array",
            expected="the end of the file",
            found=window.excerpt(),
        )


class _Window:
    """The part of a JSON file that is held in memory, with the position and line reached in it."""

    def __init__(self, file: IO[bytes], path: Path, chunk_size: int) -> None:
        self.file, self.path, self.chunk_size = file, path, chunk_size
        self.decoder = codecs.getincrementaldecoder("utf-8-sig")()
        self.scanner = json.JSONDecoder()
        self.text, self.at, self.line, self.ended = "", 0, 1, False

    def fault(self, what: str, *, expected: str, found: str) -> InputError:
        return InputError(what, where=f"{self.path}:{self.line}", expected=expected, found=found)

    def excerpt(self) -> str:
        """What stands here, for a message."""
        return repr(self.text[self.at : self.at + 60]) if self.next_character() else "the end"

    def advance(self, count: int) -> None:
        self.line += self.text.count("\n", self.at, self.at + count)
        self.at += count

    def next_character(self) -> str:
        """The next character that is no white space, left in place; empty where the file ends."""
        while True:
            self.advance(_SPACE.match(self.text, self.at).end() - self.at)  # type: ignore[union-attr]
            if self.at < len(self.text):
                return self.text[self.at]
            if not self._grow(self.chunk_size):
                return ""

    def decoded_row(self) -> tuple[int, Any]:
        """The line and the value of the object that begins here, read on until it is complete."""
        if self.next_character() != "{":
            raise self.fault(
                "a row is not a JSON object",
                expected='an object: {"messages": […]}',
                found=self.excerpt(),
            )
        line, wanted = self.line, self.chunk_size
        while True:
            try:
                value, end = self.scanner.raw_decode(self.text, self.at)
            except json.JSONDecodeError as error:
                cut = error.msg.startswith("Unterminated string") or (
                    error.pos >= len(self.text) - _LONGEST_CUT
                )
                if cut and len(self.text) - self.at > MAX_ROW_BYTES:
                    raise _too_large(f"{self.path}:{line}") from None
                # Twice as much each time: reading a long row again and again stays linear.
                if cut and self._grow(wanted):
                    wanted *= 2
                    continue
                further = self.text.count("\n", self.at, error.pos)
                raise _malformed(f"{self.path}:{line + further}", error) from None
            except (ValueError, RecursionError) as error:
                raise _malformed(f"{self.path}:{line}", error) from None
            self.advance(end - self.at)
            return line, value

    def _grow(self, size: int) -> bool:
        """Read `size` bytes more and let go of what is done with; False at the end of the file."""
        if self.ended:
            return False
        chunk = self.file.read(size)
        self.ended = not chunk
        try:
            more = self.decoder.decode(chunk, final=self.ended)
        except UnicodeDecodeError as error:
            done = self.text[self.at :].count("\n") + error.object[: error.start].count(b"\n")
            where = f"{self.path}:{self.line + done}"
            raise _not_utf8(where, error.object[error.start]) from None
        self.text, self.at = self.text[self.at :] + more, 0
        return not self.ended or bool(more)


def _malformed(where: str, error: ValueError | RecursionError) -> InputError:
    if isinstance(error, json.JSONDecodeError):
        around = error.doc[max(0, error.pos - 20) : error.pos + 40].strip()
        found = f"{error.msg}: {around!r}"
    elif isinstance(error, RecursionError):
        found = "brackets nested too deeply"
    else:
        found = str(error)
    return InputError(
        "malformed JSON",
        where=where,
        expected="one JSON object a line (.jsonl), or an array of objects (.json)",
        found=found,
        do="correct or remove this row",
    )


def _not_utf8(where: str, byte: int, column: int | None = None) -> InputError:
    at = f" at byte {column + 1} of the line" if column is not None else ""
    return InputError(
        "the text is not UTF-8",
        where=where,
        expected="UTF-8 text",
        found=f"byte 0x{byte:02x}{at}",
        do="save the file as UTF-8; a binary or compressed file has to be unpacked first",
    )


def _too_large(where: str) -> InputError:
    return InputError(
        "a row is too large",
        where=where,
        expected=f"at most {MAX_ROW_BYTES // 2**20} MiB a row",
        found="more than that without an end",
        do="check that this is a data file",
    )
