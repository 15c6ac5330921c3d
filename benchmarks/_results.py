"""What every benchmark here does: its two options, its tables, and the dated file it leaves."""

from __future__ import annotations

import argparse
import datetime
import importlib.util
import json
import math
import os
import platform
import time
import traceback
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from _table import table

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

Row = dict[str, object]
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
GPU = DEVICE.type == "cuda"
RESULTS = Path(__file__).parent / "results"


def parser(
    description: str | None, *, timed: bool = False, rest: bool = False
) -> argparse.ArgumentParser:
    """The options of every benchmark.

    Args:
        description: of the benchmark, its first line.
        timed: whether it can stop itself.
        rest: whether what matters less can be measured by itself.
    """
    found = argparse.ArgumentParser(description=(description or "").splitlines()[0])
    found.add_argument("--quick", action="store_true", help="small sizes; ends within 50 seconds")
    found.add_argument("--json", action="store_true", help="one JSON object a row, and no file")
    if timed:
        found.add_argument("--seconds", type=float, help="begin nothing further after so many")
    if rest:
        found.add_argument("--rest", action="store_true", help="without what matters most")
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

    failed = False  # whether the rows ended with a failure, or one of them tells of one


def gathered(rows: Iterable[Row], *, as_json: bool, by: str = "part") -> Parts:
    """Rows by their `part`, printed as they come where JSON is asked for.

    A failure is printed and ends them: what was measured before it is kept. A row that says what
    is `wrong` with it ends nothing.
    """
    parts = Parts()
    try:
        for row in rows:
            parts.setdefault(str(row.get(by, "")), []).append(row)
            parts.failed |= bool(row.get("wrong"))
            if as_json:
                print(json.dumps(row), flush=True)
    except (Exception, SystemExit):
        traceback.print_exc()
        parts.failed = True
    return parts


def told(error: BaseException) -> str:
    """A failure in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:150]}"


def machine() -> str:
    """On what the figures were taken."""
    name = torch.cuda.get_device_name() if GPU else platform.processor() or platform.machine()
    threads = f"{os.cpu_count()} CPU cores, {torch.get_num_threads()} threads"
    found = {each: version(each) for each in ("torch", "triton", "transformers") if there(each)}
    return ", ".join([name, threads, *(f"{each} {number}" for each, number in found.items())])


def there(package: str) -> bool:
    """Whether a package is installed."""
    return importlib.util.find_spec(package) is not None


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
        SystemExit: the rows ended with a failure, or one of them tells of one.
    """
    headed = [
        f"## {part}\n\n{table(rows)}" if part else table(rows) for part, rows in parts.items()
    ]
    report = "\n\n".join(headed)
    if not options.json:
        print(report)
    failed = isinstance(parts, Parts) and parts.failed
    if failed:
        note = f"{note}\n\nThere was a failure: rows are missing, or say what is wrong.".strip()
    if parts and not options.quick and not options.json:
        _write(name, title, report, note)
    if failed:
        raise SystemExit(1)


def _write(name: str, title: str, report: str, note: str) -> None:
    today = datetime.datetime.now(tz=datetime.UTC).date().isoformat()
    said = f"`python benchmarks/{name}.py` on {machine()}.\n\n" + (f"{note}\n\n" if note else "")
    path = RESULTS / f"{name}{'-gpu' if GPU else ''}-{today}.md"
    path.write_text(f"# {title}, {today}\n\n{said}{report}\n", encoding="utf-8")
