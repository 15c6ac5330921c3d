"""What every benchmark here does: its two options, its tables, and the dated file it leaves."""

from __future__ import annotations

import argparse
import datetime
import json
import math
import os
import platform
import time
import traceback
from pathlib import Path
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

Row = dict[str, object]
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
GPU = DEVICE.type == "cuda"
RESULTS = Path(__file__).parent / "results"


def parser(description: str | None, *, timed: bool = False) -> argparse.ArgumentParser:
    """The options of every benchmark; `timed` for one that can stop itself."""
    found = argparse.ArgumentParser(description=(description or "").splitlines()[0])
    found.add_argument("--quick", action="store_true", help="small sizes; ends within 50 seconds")
    found.add_argument("--json", action="store_true", help="one JSON object a row")
    if timed:
        found.add_argument("--seconds", type=float, help="begin nothing further after so many")
    return found


class Deadline:
    """A time after which nothing further is begun.

    Args:
        seconds: from now; None never comes.
    """

    def __init__(self, seconds: float | None = None) -> None:
        self.at = math.inf if seconds is None else time.perf_counter() + seconds

    @property
    def passed(self) -> bool:
        """Whether it has come."""
        return time.perf_counter() > self.at


class Parts(dict[str, list[Row]]):
    """Rows by their `part`."""

    failed = False  # whether the rows ended with a failure


def gathered(rows: Iterable[Row], *, as_json: bool, by: str = "part") -> Parts:
    """Rows by their `part`, printed as they come where JSON is asked for.

    A failure is printed and ends them: what was measured before it is kept.
    """
    parts = Parts()
    try:
        for row in rows:
            parts.setdefault(str(row.get(by, "")), []).append(row)
            if as_json:
                print(json.dumps(row), flush=True)
    except (Exception, SystemExit):
        traceback.print_exc()
        parts.failed = True
    return parts


def table(rows: Sequence[Mapping[str, object]]) -> str:
    """Rows of equal keys as a Markdown table, without their `part`."""
    columns = [name for name in rows[0] if name != "part"]
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    lines += [
        "| " + " | ".join("–" if row[c] is None else str(row[c]) for c in columns) + " |"
        for row in rows
    ]
    return "\n".join(lines)


def machine() -> str:
    """On what the figures were taken."""
    name = torch.cuda.get_device_name() if GPU else platform.processor() or platform.machine()
    threads = f"{os.cpu_count()} CPU cores, {torch.get_num_threads()} threads"
    return f"{name}, {threads}, torch {torch.__version__}"


def finish(
    name: str,
    title: str,
    parts: Mapping[str, Sequence[Mapping[str, object]]],
    options: argparse.Namespace,
    *,
    note: str = "",
) -> None:
    """Print the tables, and write them to a dated file after a full run.

    Raises:
        SystemExit: the rows ended with a failure.
    """
    headed = [
        f"## {part}\n\n{table(rows)}" if part else table(rows) for part, rows in parts.items()
    ]
    report = "\n\n".join(headed)
    if not options.json:
        print(report)
    failed = isinstance(parts, Parts) and parts.failed
    if failed:
        note = f"{note}\n\nIt ended with a failure: rows are missing.".strip()
    if not options.quick and parts:
        _write(name, title, report, note)
    if failed:
        raise SystemExit(1)


def _write(name: str, title: str, report: str, note: str) -> None:
    today = datetime.datetime.now(tz=datetime.UTC).date().isoformat()
    said = f"`python benchmarks/{name}.py` on {machine()}.\n\n" + (f"{note}\n\n" if note else "")
    path = RESULTS / f"{name}{'-gpu' if GPU else ''}-{today}.md"
    path.write_text(f"# {title}, {today}\n\n{said}{report}\n", encoding="utf-8")
