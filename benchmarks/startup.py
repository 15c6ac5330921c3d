"""What a command takes before it does anything: processor time of interpreters that just start.

`dominie --help`, `check` of a toy recipe, and a `run` that finds everything done; torch and
transformers alone beside them, of which none but the help can be free. Medians over the rounds, in
which the commands take turns; processor time, as other work on the machine changes it least.

    python benchmarks/startup.py [--quick] [--json]

``--quick`` ends within 50 seconds on two cores; a full run also writes a dated table to
``benchmarks/results``.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

import _results

if TYPE_CHECKING:
    from collections.abc import Iterator

    from _results import Row

RECIPE = """
name: small
data: {d: {path: "toyworld:general?rows=60", test_fraction: 0.2}}
train: {learning_rate: 1e-3, steps: 2, batch: 4, max_length: 64}
stages: {s: {student: "toyworld:student", data: {d: 1.0}, loss: {next_token: 1.0}}}
evaluate: {models: {s: s}, tasks: {t: {source: d, limit: 3}}}
"""
DOMINIE = ["-m", "dominie"]
#: Each with the processor seconds that it may take on idle cores.
COMMANDS: dict[str, tuple[list[str], float | None]] = {
    "dominie --help": ([*DOMINIE, "--help"], 0.25),
    "dominie check": ([*DOMINIE, "check", "r.yaml"], 3.0),
    "dominie run, all done": ([*DOMINIE, "run", "r.yaml"], 3.0),
    "import torch": (["-c", "import torch"], None),
    "import transformers' models": (["-c", "from transformers import PreTrainedModel"], None),
}


def taken(arguments: list[str], folder: Path) -> tuple[float, float]:
    """(wall, CPU) seconds of an interpreter."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    before, began = os.times(), time.perf_counter()
    subprocess.run(
        [sys.executable, *arguments], cwd=folder, env=environment, check=True, capture_output=True
    )
    after = os.times()
    cpu = after.children_user + after.children_system
    return time.perf_counter() - began, cpu - before.children_user - before.children_system


def rows(rounds: int) -> Iterator[Row]:
    """One row for each command."""
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in COMMANDS}
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        (folder / "r.yaml").write_text(RECIPE)
        taken([*DOMINIE, "run", "r.yaml"], folder)
        for _ in range(rounds):
            for name, (arguments, _) in COMMANDS.items():
                times[name].append(taken(arguments, folder))
    for name, (_, goal) in COMMANDS.items():
        wall, cpu = (statistics.median(each[clock] for each in times[name]) for clock in (0, 1))
        yield {
            "command": name,
            "cpu_seconds": round(cpu, 2),
            "wall_seconds": round(wall, 2),
            "goal": goal or "",
        }


def main() -> None:
    """Measure, print, and after a full run write down."""
    options = _results.parser(__doc__).parse_args()
    parts = _results.gathered(rows(1 if options.quick else 5), as_json=options.json)
    _results.finish("startup", "Start-up", parts, options)


if __name__ == "__main__":
    main()
