"""Rows of JSON Lines and JSON files, with their line numbers; a bad row is an error among them."""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from dominie.core.errors import InputError

MAX_ROW_BYTES = 64 * 2**20  # of a line of a JSON Lines file: a longer one is no conversation
MAX_JSON_BYTES = 2**30  # of a JSON file, which is read whole
_SPACE = re.compile(r"[ \t\r\n]*")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON, in which the last of two equal keys would win without a word."""
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key {twice!r} stands twice in one object")
    return found


DECODER = json.JSONDecoder(object_pairs_hook=_object)
"""Reads JSON as `json.loads` does, and refuses an object with the same key twice."""


def jsonl_rows(path: Path) -> Iterator[tuple[int, Any | InputError]]:
    """The rows of a JSON Lines file as (line number, value); a bad line yields its InputError.

    Blank lines are skipped. Memory is bounded by the longest line.
    """
    with path.open("rb") as file:
        for number, raw in enumerate(iter(lambda: file.readline(MAX_ROW_BYTES + 1), b""), 1):
            where = f"{path}:{number}"
            if len(raw) > MAX_ROW_BYTES:
                too_large = InputError(
                    "a row is too large",
                    where=where,
                    expected=f"at most {MAX_ROW_BYTES >> 20} MiB a row",
                    do="check that this is a data file",
                )
                yield number, too_large
                return
            if number == 1:
                raw = raw.removeprefix(codecs.BOM_UTF8)
            if not raw.strip():
                continue
            try:
                # RecursionError: nested too deeply. Plain ValueError: a number of too many digits.
                yield number, DECODER.decode(raw.decode("utf-8"))
            except (ValueError, RecursionError) as error:
                yield number, _malformed(where, error)


def json_rows(path: Path) -> Iterator[tuple[int, Any | InputError]]:
    """The rows of a JSON file as (line number, value), an array of rows or rows one after another.

    The file is read whole. After a malformed row its InputError is the last thing yielded.
    """
    text = _JsonText(path)
    try:
        text.read()
        yield from text.rows()
    except InputError as error:
        yield text.line, error


class _JsonText:
    """The text of a JSON file, with the position and the line reached in it."""

    def __init__(self, path: Path) -> None:
        self.path, self.text, self.at, self.line = path, "", 0, 1
        self.scan = DECODER.raw_decode

    def read(self) -> None:
        if self.path.stat().st_size > MAX_JSON_BYTES:
            raise InputError(
                "the file is too large",
                where=str(self.path),
                expected=f"a JSON file of at most {MAX_JSON_BYTES >> 20:,} MiB",
                do="save it as JSON Lines (.jsonl), which is read line by line",
            )
        data = self.path.read_bytes().removeprefix(codecs.BOM_UTF8)
        try:
            self.text = data.decode("utf-8")
        except UnicodeDecodeError as error:
            self.line += data.count(b"\n", 0, error.start)
            raise _malformed(f"{self.path}:{self.line}", error) from None

    def rows(self) -> Iterator[tuple[int, Any]]:
        """The objects of one array, or those that follow one another without one."""
        if not self.take("["):
            while self.next_character():
                yield self.decoded_row()
            return
        if not self.take("]"):
            yield self.decoded_row()
            while self.take(","):
                yield self.decoded_row()
            if not self.take("]"):
                then = "a comma or the closing ]"
                if self.next_character():
                    raise InputError("malformed JSON", expected=then, **self.place())
                raise InputError("the array is broken off", expected=then, **self.place())
        if self.next_character():
            raise InputError(
                "there is more after the end of the array",
                expected="the end of the file",
                **self.place(),
            )

    def place(self) -> dict[str, str]:
        """Where the file was read, and what was found there."""
        found = repr(self.text[self.at : self.at + 60]) if self.next_character() else "the end"
        return {"where": f"{self.path}:{self.line}", "found": found}

    def advance(self, to: int) -> None:
        self.line += self.text.count("\n", self.at, to)
        self.at = to

    def next_character(self) -> str:
        """The next character that is no white space, left in place; empty at the end."""
        self.advance(_SPACE.match(self.text, self.at).end())  # type: ignore[union-attr]
        return self.text[self.at : self.at + 1]

    def take(self, character: str) -> bool:
        """Step over `character` if it is next."""
        found = self.next_character() == character
        if found:
            self.advance(self.at + 1)
        return found

    def decoded_row(self) -> tuple[int, Any]:
        """The line and the value of the object that begins here."""
        if self.next_character() != "{":
            raise InputError(
                "a row is not a JSON object",
                expected='an object, such as {"messages": […]} for a conversation',
                **self.place(),
            )
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


def check_encodable(messages: list[dict[str, Any]], tools: Any, where: str) -> None:
    """Refuse half a surrogate pair, which JSON can escape and no tokenizer can read."""
    plain = tools is None and all(len(message) == 2 for message in messages)
    try:
        if plain:  # role and content alone, as nearly always: three times as fast
            "".join(message["content"] for message in messages).encode()
        else:
            json.dumps((messages, tools), ensure_ascii=False, default=str).encode()
    except UnicodeEncodeError as error:
        found = f"the code unit \\u{ord(error.object[error.start]):04x} alone"
        raise InputError(
            "the text holds half of a surrogate pair", where=where, found=found
        ) from None
    except (ValueError, RecursionError) as error:
        raise InputError("the row is nested too deeply", where=where, found=str(error)) from None


def without_nulls(value: Any) -> Any:
    """A nested value without the keys whose value is null.

    A Parquet column gives every object every key, so that the arguments of one tool call would
    carry the names of all others; and so does JSON that was written of such a column.
    """
    if isinstance(value, dict):
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [without_nulls(item) for item in value]
    return value


def drop_inner_nulls(columns: dict[str, Any]) -> bool:
    """Apply `without_nulls` to columns that are lists; return whether that changed more than keys.

    The keys are those of a row's messages and tools themselves, where null and absent are one.
    """
    changed = False
    for name, value in columns.items():
        if isinstance(value, list):
            outer = [
                {key: item for key, item in each.items() if item is not None}
                if isinstance(each, dict)
                else each
                for each in value
            ]
            columns[name] = without_nulls(outer)
            changed |= columns[name] != outer
    return changed


def whole_characters(value: Any) -> Any:
    """Return a JSON value with U+FFFD for each half of a surrogate pair in its texts.

    JSON can escape half a pair, as servers do that cut a text off between the two; no file, request
    or tokenizer can hold it.
    """
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError:
            return value.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
        return value
    if isinstance(value, list):
        return [whole_characters(item) for item in value]
    if isinstance(value, dict):
        return {whole_characters(key): whole_characters(item) for key, item in value.items()}
    return value


def lost_characters(texts: Sequence[str], what: str) -> str | None:
    """Return a warning of texts with U+FFFD, as `whole_characters` leaves them; None without."""
    lost = sum("\ufffd" in text for text in texts)
    if not lost:
        return None
    return f"{lost} of {len(texts)} {what} hold U+FFFD, in the place of what was no character"
