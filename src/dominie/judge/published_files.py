"""Files of benchmarks as their authors publish them: JSON arrays, JSON Lines and CSV."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

from dominie.core.errors import InputError
from dominie.data.json_files import json_rows, jsonl_rows
from dominie.judge.judge_prompts import Prompt, preference_prompt

T = TypeVar("T")


def read_objects(path: Path, *, what: str) -> list[tuple[str, dict[str, Any]]]:
    """The objects of a JSON or JSON Lines file, each with its place.

    Args:
        path: the file.
        what: what it holds, for messages.

    Raises:
        InputError: it is missing, empty, malformed, or holds something else.
    """
    rows = jsonl_rows(path) if path.suffix in (".jsonl", ".ndjson") else json_rows(path)
    found = []
    try:
        for line, row in rows:
            where = f"{path}:{line}"
            if isinstance(row, InputError):
                raise row
            if not isinstance(row, dict):
                raise InputError(f"no object of {what}", where=where, found=repr(row)[:80])
            found.append((where, row))
    except OSError as error:
        raise _unreadable(path, what, error) from None
    if not found:
        raise InputError(f"the file of {what} is empty", where=str(path))
    return found


def read_csv(path: Path, *, what: str) -> list[tuple[str, dict[str, str]]]:
    """The rows of a CSV file by column, each with its place.

    Raises:
        InputError: as `read_objects`.
    """
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file)
            found = [(f"{path}:{reader.line_num}", dict(row)) for row in reader]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise _unreadable(path, what, error) from None
    if not found:
        raise InputError(f"the file of {what} is empty", where=str(path))
    return found


def read_text(path: Path, *, what: str) -> str:
    """A text file.

    Raises:
        InputError: it is missing, empty or not UTF-8.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise _unreadable(path, what, error) from None
    if not text.strip():
        raise InputError(f"the file of {what} is empty", where=str(path))
    return text


def text_field(row: Mapping[str, Any], name: str, *, where: str) -> str:
    """A field that has to be text.

    Raises:
        InputError: it is missing or something else.
    """
    value = row.get(name)
    if isinstance(value, str):
        return value
    found = f"{name}: {json.dumps(value)[:80]}" if name in row else f"keys {', '.join(row)}"
    raise InputError(f"no text under {name!r}", where=where, found=found)


def number_field(row: Mapping[str, Any], name: str, *, where: str) -> float:
    """A field that has to be a finite number, or to spell one.

    Raises:
        InputError: it is missing or something else.
    """
    try:
        value = float(row[name])
        if math.isfinite(value):
            return value
    except (KeyError, TypeError, ValueError):
        pass
    raise InputError(f"no number under {name!r}", where=where, found=repr(row.get(name)))


def by_unique(
    items: Iterable[tuple[str, T]], key: Callable[[T], Any], *, what: str
) -> dict[Any, T]:
    """Items by a key that must not come twice.

    Raises:
        InputError: names both places.
    """
    found: dict[Any, T] = {}
    places: dict[Any, str] = {}
    for where, item in items:
        name = key(item)
        if name in found:
            raise InputError(
                f"{what} {name!r:.80} stands twice",
                where=where,
                found=f"the first at {places[name]}",
                do="remove one of the two",
            )
        found[name], places[name] = item, where
    return found


def _unreadable(path: Path, what: str, error: Exception) -> InputError:
    missing = isinstance(error, FileNotFoundError)
    return InputError(
        f"there is no such file of {what}" if missing else f"the file of {what} cannot be read",
        where=str(path),
        found=None if missing else (getattr(error, "strerror", None) or str(error)),
        do="name the file as its authors publish it; docs/evaluation.md says where it is found",
    )


_FIELDS = ("instruction", "output_1", "output_2")


@dataclass(frozen=True)
class Instruction:
    """An instruction and what the baseline answered.

    Attributes:
        id: its place in the evaluation set.
        instruction: what the user says.
        output: the baseline's answer.
        generator: the baseline's name.
        dataset: where the instruction is from.
    """

    id: int
    instruction: str
    output: str
    generator: str
    dataset: str


def read_baseline(path: str) -> list[Instruction]:
    """Instructions with a baseline's answers: a file of outputs, or of annotations.

    Raises:
        InputError: the file is missing or malformed, or an instruction stands twice.
    """
    placed = read_objects(Path(path), what="baseline outputs")
    ending = "_1" if "output_1" in placed[0][1] else ""
    found = [
        (
            where,
            Instruction(
                id=i,
                instruction=text_field(row, "instruction", where=where),
                output=text_field(row, f"output{ending}", where=where),
                generator=str(row.get(f"generator{ending}", "baseline")),
                dataset=str(row.get("dataset", "all")),
            ),
        )
        for i, (where, row) in enumerate(placed)
    ]
    return list(by_unique(found, lambda item: item.instruction, what="instruction").values())


def preference_prompt_of(path: str | None, version: Literal[1, 2]) -> Prompt:
    """Upstream's prompt of a version, or our own.

    Raises:
        InputError: the file is missing, or lacks a field.
    """
    if path is None:
        return preference_prompt(weighted=version == 2)
    text = read_text(Path(path), what="the judge's prompt")
    made = Prompt(Path(path).stem, text, None, "identifier" if version == 2 else "ranking")
    if missing := [field for field in _FIELDS if field not in made.fields]:
        raise InputError(
            f"the prompt lacks {{{missing[0]}}}",
            where=path,
            expected=", ".join(f"{{{field}}}" for field in _FIELDS),
            do="use upstream's prompt file, or leave prompt out for our own words",
        )
    return made
