"""Lines of `metrics.jsonl`: appended whole, cut back to a checkpoint's step on resume."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


class Records:
    """A JSON-lines file of metrics.

    Args:
        path: the file; made when the first line comes.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def append(self, record: dict[str, Any]) -> None:
        """Add one line."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")

    def rewind(self, step: int, copy: Path | None = None) -> dict[str, Any]:
        """Drop lines after `step`, and a last line that was cut off in the writing.

        Args:
            step: the last that counts.
            copy: of the lines as they were then, which is believed rather than the file.

        Returns:
            The last training line that is left, empty without one.
        """
        source = copy if copy is not None and copy.exists() else self.path
        if not source.exists():
            return {}
        kept = [
            line
            for line in source.read_text(encoding="utf-8", errors="replace").splitlines()
            if _step(line, step + 1) <= step
        ]
        scratch = self.path.with_suffix(".tmp")
        scratch.write_text("".join(line + "\n" for line in kept), encoding="utf-8")
        scratch.replace(self.path)
        return next(
            (record for line in reversed(kept) if "terms" in (record := json.loads(line))), {}
        )

    def token_shares(self) -> dict[str, float]:
        """Each source's fraction of the supervised tokens trained on so far."""
        tokens: dict[str, int] = {}
        for record in self.read():
            for source, means in record.get("sources", {}).items():
                tokens[source] = tokens.get(source, 0) + means["tokens"]
        total = max(sum(tokens.values()), 1)
        return {source: round(count / total, 6) for source, count in tokens.items()}

    def read(self) -> list[dict[str, Any]]:
        """Every line."""
        if not self.path.exists():
            return []
        return [json.loads(line) for line in self.path.read_text(encoding="utf-8").splitlines()]


def _step(line: str, when_broken: int) -> int:
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return when_broken
