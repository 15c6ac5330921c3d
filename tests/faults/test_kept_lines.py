"""Kept answers and replies: every kind of character and line damaged; the same, or named."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from dominie.core.errors import InputError
from dominie.generation.generator import Generation
from dominie.generation.reply_log import ReplyLog, call_key
from dominie.judge.benchmark import AnswersFile, Dialogue

TURNS = [("copy red é 7",), ("say “no”\n", "and \\ 12"), ("日本 3", "x"), ("add 4 5",)]
#: A place in a line for each class of character: what stands before it, the character, after it.
CLASSES = {
    "opening brace": rb"()\{",
    "closing brace": rb"()\}\Z",
    "bracket": rb"()\[",
    "colon": rb'"()(?=:)',
    "comma": rb'"()(?=, ")',
    "space": rb":()(?= )",
    "quote of a name": rb', ()(?=")',
    "quote of a value": rb': ()(?=")',
    "name": rb', "()(?=\w)',
    "key": rb'"key": "()(?=\w)',
    "number": rb'": ()(?=\d)',
    "word": rb'"[^"]*?()[a-z](?=[a-z ]+\d?[^":]*"\])',
    "digit": rb'[a-z ]()\d(?=[^":]*"\])',
    "escape": rb"()\\\\",
    "first byte of a character": rb"()[\xc2-\xf4]",
    "later byte of a character": rb"[\xc2-\xf4]()[\x80-\xbf]",
    "name of the checksum": rb'"chec()ksum',
    "checksum": rb'"checksum": "..()',
}
DAMAGES: dict[str, Callable[[int], bytes]] = {
    "low bit": lambda byte: bytes([byte ^ 1]),
    "high bit": lambda byte: bytes([byte ^ 0x80]),
    "bit of case": lambda byte: bytes([byte ^ 0x20]),
    "lost": lambda byte: b"",
    "doubled": lambda byte: bytes([byte, byte]),
    "NUL": lambda byte: b"\0",
    "line end": lambda byte: b"\n",
}


def few(names: Iterable[str], *fast: str) -> list[Any]:
    """All names; those that are not fast are of `make test-full`."""
    return [n if n in fast else pytest.param(n, marks=pytest.mark.full) for n in names]


class Echo:
    """Answers with what it was asked, and counts how often."""

    asked = 0

    def identity(self, sampling: Any) -> dict[str, Any]:
        return {"model": "m"}

    def generate(self, requests, on_result, *, on_text=None, advance=None) -> None:
        for index, request in enumerate(requests):
            while request is not None:
                self.asked += 1
                text = f"{len(request.messages)}: {request.messages[-1]['content']}"
                request = on_result(index, Generation(text, "stop"))


def answers(path: Path) -> tuple[Any, int]:
    """All answers of the file, completed, and how many were asked for anew."""
    benchmark = SimpleNamespace(
        dialogues=[Dialogue(i, turns) for i, turns in enumerate(TURNS)],
        max_new_tokens=6,
        seed=0,
        answer_row=lambda d, turns, model: {
            "question_id": d.id,
            "model_id": model,
            "choices": [{"turns": list(turns)}],
        },
        answers_in=lambda row: row["choices"][0]["turns"],
    )
    generator = Echo()
    return AnswersFile(path, benchmark, "me").complete(generator), generator.asked


def replies(path: Path) -> tuple[Any, int]:
    """All replies of the log by key, and how many calls would be paid again."""
    log, found, again = ReplyLog(path), {}, 0
    for number, turns in enumerate(TURNS):
        key = call_key("m", turns)
        if not log.replies(key):
            again += 1
            content = {"message": {"content": f"{turns[-1]} [[{number}]]"}}
            body = json.dumps({"choices": [content]}, ensure_ascii=False)
            log.append({"key": key, "status": 200, "cost": 0.5, "body": body, "n": [f"a {number}"]})
        found[key] = log.replies(key)[0]  # the oldest counts
    return found, again


READERS = {"answers.jsonl": answers, "replies.jsonl": replies}


@pytest.fixture(scope="module", params=READERS)
def kept(request, tmp_path_factory) -> SimpleNamespace:
    """A file as it was written, what is in it, and its reader."""
    path = tmp_path_factory.mktemp("lines") / request.param
    read = READERS[request.param]
    good, _ = read(path)
    assert read(path) == (good, 0)
    return SimpleNamespace(name=request.param, content=path.read_bytes(), good=good, read=read)


def same(kept, path: Path, *, lost: int = 0) -> bool:
    """Whether all is found as it was; else one message names the line."""
    try:
        found, again = kept.read(path)
    except InputError as error:
        told = str(error)
    else:
        told = ""
    if told:
        assert re.search(rf"{kept.name}(:\d+)?", told)
        assert "\n  do  " in told, told
        return False
    assert found == kept.good, "silently another answer"
    assert again <= lost, "what was paid for is paid again"
    assert kept.read(path) == (kept.good, 0), "and it is written whole"
    return True


def places(line: bytes) -> Iterator[tuple[str, int]]:
    for name, pattern in CLASSES.items():
        if match := re.search(pattern, line):
            yield name, match.start(1)


def test_some_characters(kept, tmp_path, tally):
    first, line, *rest = kept.content.splitlines(keepends=True)
    path = tmp_path / kept.name
    for _, at in list(places(line))[::2]:
        damaged = line[:at] + bytes([line[at] ^ 1]) + line[at + 1 :]
        path.write_bytes(b"".join([first, damaged, *rest]))
        tally(f"{kept.name}: a character", same=same(kept, path))


@pytest.mark.full
@pytest.mark.parametrize("how", DAMAGES)
def test_every_kind_of_character(kept, tmp_path, tally, how):
    lines = kept.content.splitlines(keepends=True)
    seen = set()
    for number, line in enumerate(lines):
        for name, at in places(line):
            seen.add(name)
            path = tmp_path / kept.name
            damaged = line[:at] + DAMAGES[how](line[at]) + line[at + 1 :]
            path.write_bytes(b"".join([*lines[:number], damaged, *lines[number + 1 :]]))
            # A line end in the last line makes what follows it a line that was cut off.
            ended = same(kept, path)
            tally(f"{kept.name}: a character", same=ended)
    assert len(seen) > len(CLASSES) - 4, set(CLASSES) - seen


LINES: dict[str, Callable[[list[bytes]], list[bytes]]] = {
    "first lost": lambda lines: lines[1:],
    "last lost": lambda lines: lines[:-1],
    "middle lost": lambda lines: [*lines[:1], *lines[2:]],
    "doubled": lambda lines: [*lines, lines[1]],
    "each doubled": lambda lines: [*lines, *lines],
    "reversed": lambda lines: lines[::-1],
    "joined": lambda lines: [lines[0][:-1], *lines[1:]],
    "blank lines": lambda lines: [part for line in lines for part in (line, b"\n")],
    "Windows line ends": lambda lines: [line[:-1] + b"\r\n" for line in lines],
    "byte-order mark": lambda lines: [b"\xef\xbb\xbf", *lines],
    "zeros after": lambda lines: [*lines, bytes(512)],
    "zeros and a line end after": lambda lines: [*lines, bytes(512), b"\n"],
    "a line of zeros": lambda lines: [lines[0], bytes(len(lines[1]) - 1) + b"\n", *lines[2:]],
    "emptied": lambda lines: [],
    "half of the file": lambda lines: [b"".join(lines)[: sum(map(len, lines)) // 2]],
    "half of a line": lambda lines: [lines[0], lines[1][: len(lines[1]) // 2] + b"\n", *lines[2:]],
    "two halves": lambda lines: [lines[0][:40], lines[1][40:], *lines[2:]],
    "another object": lambda lines: [*lines[:2], b"{}\n", *lines[3:]],
    "a list": lambda lines: [*lines[:2], b"[1]\n", *lines[3:]],
    "a number": lambda lines: [*lines[:2], b"7\n", *lines[3:]],
    "in UTF-16": lambda lines: [b"".join(lines).decode().encode("utf-16")],
    "of another file": lambda lines: [*lines, b'{"key": "x", "status": 200, "body": "y"}\n'],
}
#: Lines that are gone without a trace are asked for again.
LOST = {"first lost": 1, "last lost": 1, "middle lost": 2, "emptied": 6, "half of the file": 5}


@pytest.mark.parametrize("how", few(LINES, "joined"))
def test_every_kind_of_line(kept, tmp_path, tally, how):
    lines = kept.content.splitlines(keepends=True)
    path = tmp_path / kept.name
    path.write_bytes(b"".join(LINES[how](lines)))
    tally(f"{kept.name}: lines", same=same(kept, path, lost=LOST.get(how, 0)))


@pytest.mark.full
def test_cut_off_anywhere(kept, tmp_path, tally):
    """What is cut off within a line is asked for again, and no more."""
    path = tmp_path / kept.name
    ends = [match.end() for match in re.finditer(b"\n", kept.content)]
    for at in range(0, len(kept.content), 7):
        path.write_bytes(kept.content[:at])
        left = sum(end > at + 1 for end in ends)  # a line end alone may be missing
        tally(f"{kept.name}: cut off", same=same(kept, path, lost=2 * left))
