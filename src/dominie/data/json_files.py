"""Reads JSON Lines and JSON files row by row, with line numbers."""

from __future__ import annotations

import codecs
import json
import re
from typing import TYPE_CHECKING, Any

from dominie.core.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

MAX_ROW_BYTES = 64 * 2**20
"""Of a line of a JSON Lines file: a longer one is no conversation."""
MAX_JSON_BYTES = 2**30
"""Of a JSON file, which is read whole."""
_SPACE = re.compile(r"[ \t\r\n]*")


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
                yield (
                    number,
                    InputError(
                        "a row is too large",
                        where=where,
                        expected=f"at most {MAX_ROW_BYTES >> 20} MiB a row",
                        do="check that this is a data file",
                    ),
                )
                return
            if number == 1:
                raw = raw.removeprefix(codecs.BOM_UTF8)
            if not raw.strip():
                continue
            try:
                # RecursionError: nested too deeply. Plain ValueError: a number of too many digits.
                yield number, json.loads(raw.decode("utf-8"))
            except (ValueError, RecursionError) as error:
                yield number, _malformed(where, error)


def json_rows(path: Path) -> Iterator[tuple[int, Any | InputError]]:
    """The rows of a JSON file as (line number, value), an array of rows or rows one after another.

    The file is read whole, so that its size is limited. After a malformed row nothing can be
    trusted: its InputError is the last thing yielded.
    """
    if path.stat().st_size > MAX_JSON_BYTES:
        yield (
            1,
            InputError(
                "the file is too large",
                where=str(path),
                expected=f"a JSON file of at most {MAX_JSON_BYTES >> 20:,} MiB",
                do="save it as JSON Lines (.jsonl), which is read line by line",
            ),
        )
        return
    data = path.read_bytes().removeprefix(codecs.BOM_UTF8)
    try:
        text = _JsonText(path, data.decode("utf-8"))
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        yield line, _malformed(f"{path}:{line}", error)
        return
    del data
    try:
        if text.next_character() == "[":
            yield from _array_rows(text)
        else:
            while text.next_character():
                yield text.decoded_row()
    except InputError as error:
        yield text.line, error


def _array_rows(text: _JsonText) -> Iterator[tuple[int, Any]]:
    """The rows from an opening bracket to its closing one, which has to end the file."""
    text.advance(text.at + 1)
    separator = "]" if text.next_character() == "]" else ","
    while separator == ",":
        yield text.decoded_row()
        separator = text.next_character()
        if separator == ",":
            text.advance(text.at + 1)
        elif separator != "]":
            raise text.fault(
                "malformed JSON" if separator else "the array is broken off",
                expected="a comma or the closing ]",
            )
    text.advance(text.at + 1)
    if text.next_character():
        raise text.fault("there is more after the end of the array", expected="the end of the file")


class _JsonText:
    """A JSON text, with the position and the line reached in it."""

    def __init__(self, path: Path, text: str) -> None:
        self.path, self.text, self.at, self.line = path, text, 0, 1
        self.scan = json.JSONDecoder().raw_decode

    def fault(self, what: str, *, expected: str) -> InputError:
        found = repr(self.text[self.at : self.at + 60]) if self.next_character() else "the end"
        return InputError(what, where=f"{self.path}:{self.line}", expected=expected, found=found)

    def advance(self, to: int) -> None:
        self.line += self.text.count("\n", self.at, to)
        self.at = to

    def next_character(self) -> str:
        """The next character that is no white space, left in place; empty at the end."""
        self.advance(_SPACE.match(self.text, self.at).end())  # type: ignore[union-attr]
        return self.text[self.at : self.at + 1]

    def decoded_row(self) -> tuple[int, Any]:
        """The line and the value of the object that begins here."""
        if self.next_character() != "{":
            raise self.fault("a row is not a JSON object", expected='an object: {"messages": […]}')
        line = self.line
        try:
            value, end = self.scan(self.text, self.at)
        except (ValueError, RecursionError) as error:
            if isinstance(error, json.JSONDecodeError):
                line += self.text.count("\n", self.at, error.pos)
            raise _malformed(f"{self.path}:{line}", error) from None
        self.advance(end)
        return line, value


def _malformed(where: str, error: ValueError | RecursionError) -> InputError:
    if isinstance(error, UnicodeDecodeError):
        column = error.start - error.object.rfind(b"\n", 0, error.start)
        return InputError(
            "the text is not UTF-8",
            where=where,
            expected="UTF-8 text",
            found=f"byte 0x{error.object[error.start]:02x} at byte {column} of the line",
            do="save the file as UTF-8; a binary or compressed file has to be unpacked first",
        )
    found = "brackets nested too deeply" if isinstance(error, RecursionError) else str(error)
    if isinstance(error, json.JSONDecodeError):
        around = error.doc[max(0, error.pos - 20) : error.pos + 40].strip()
        found = f"{error.msg}: {around!r}"
    return InputError(
        "malformed JSON",
        where=where,
        expected="one JSON object a line (.jsonl), or an array of objects (.json)",
        found=found,
        do="correct or remove this row",
    )
