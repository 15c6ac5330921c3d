"""Every reply of an endpoint as it came, on disk before it counts; what is there stays answered."""

from __future__ import annotations

import hashlib
import json
import os
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dominie.errors import InputError


def call_key(*parts: Any) -> str:
    """32 hexadecimal digits of all a reply depends on: model, prompt, sampling."""
    text = json.dumps(parts, sort_keys=True, ensure_ascii=False)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


class Ledger:
    """A JSON Lines file that is only appended to; each line is on disk before `append` returns.

    A line that a crash cut in two is moved out of the way when the file is opened again.

    Args:
        path: the file; made with its folder by the first `append`.

    Raises:
        InputError: the file cannot be read, or is damaged elsewhere than in its last line.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._by_key: dict[str, list[dict[str, Any]]] = defaultdict(list)
        self._file: Any = None
        for record in self._whole_lines():
            self._by_key[record["key"]].append(record)

    def of(self, key: str) -> list[dict[str, Any]]:
        """What was written under a key, oldest first."""
        return self._by_key.get(key, [])

    @property
    def records(self) -> list[dict[str, Any]]:
        """All that was written, key by key."""
        return [record for records in self._by_key.values() for record in records]

    def append(self, record: Mapping[str, Any]) -> None:
        """Write a record, which has a `key`, and wait until it is on disk."""
        if self._file is None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self.path.open("ab")
        self._file.write(json.dumps(record, ensure_ascii=False).encode() + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())
        self._by_key[record["key"]].append(dict(record))

    def close(self) -> None:
        """Close the file; a later `append` opens it again."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _whole_lines(self) -> list[dict[str, Any]]:
        try:
            content = self.path.read_bytes()
        except FileNotFoundError:
            return []
        except OSError as error:
            raise InputError("cannot be read", where=str(self.path), found=error.strerror) from None
        lines = content.split(b"\n")
        torn = lines.pop()  # empty where the last line is whole
        if torn:
            with self.path.open("r+b") as file:
                file.truncate(len(content) - len(torn))
                os.fsync(file.fileno())
        return [self._parsed(line, number) for number, line in enumerate(lines, 1) if line.strip()]

    def _parsed(self, line: bytes, number: int) -> dict[str, Any]:
        try:
            record = json.loads(line)
            if isinstance(record, dict) and isinstance(record.get("key"), str):
                return record
            found = "no record of a reply"
        except ValueError as error:
            found = str(error)
        raise InputError(
            "the record of replies is damaged",
            where=f"{self.path}:{number}",
            found=found,
            do="correct or remove this line; what it held is then asked again",
        )
