"""A stage with its teacher in each place that a recipe has a key for: memory and time of a step.

Every row is a recipe over the same random models, run by the ordinary trainer in a process of its
own (two of them for `x 2`), and differs in `models.teacher.placement` and `teacher_micro_batch`
alone.

    python benchmarks/placement.py [--quick] [--json] [--only PLACE] [--no-file]

``--quick`` ends within 50 seconds on two cores: smaller models, three rows; a full run also writes
a dated table to ``benchmarks/results``.
"""

from __future__ import annotations

import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import _results
import torch
from _memory import resident, settled
from plan import Case

from dominie.toyworld.toy_models import word_tokenizer

if TYPE_CHECKING:
    from collections.abc import Iterator

STEPS = 4
VOCABULARY = len(word_tokenizer())  # all that a cache keeps probabilities of
MICRO_BATCHES = 4  # of a step
FULL = Case(
    student={
        "hidden_size": 256,
        "num_hidden_layers": 8,
        "intermediate_size": 768,
        "vocab_size": VOCABULARY,
    },
    teacher={
        "hidden_size": 320,
        "num_hidden_layers": 24,
        "intermediate_size": 640,
        "vocab_size": VOCABULARY,
        "num_local_experts": 8,
    },
    train={"max_length": 128, "steps": STEPS, "log_every": 1, "packing": False},
    loss={"prediction": 1.0},
)
QUICK = Case(
    student={**FULL.student, "num_hidden_layers": 2},
    teacher={**FULL.teacher, "num_hidden_layers": 6},
    train={**FULL.train, "max_length": 32},
    loss=FULL.loss,
)


@dataclass(frozen=True)
class Place:
    """A row: where the teacher lies, on how many processes, and what it reads at once."""

    placement: str
    ranks: int = 1
    together: int = 1
    package: str | None = None

    @property
    def name(self) -> str:
        """Of the row."""
        ranks = f" x {self.ranks}" if self.ranks > 1 else ""
        return self.placement + ranks + (f", {self.together} at once" if self.together > 1 else "")

    @property
    def overrides(self) -> list[str]:
        """Of the recipe."""
        found = [f"train.batch={MICRO_BATCHES * self.ranks}", "train.micro_batch=1"]
        if self.together > 1:
            found.append(f"train.teacher_micro_batch={self.together}")
        return found


PLACES = (
    Place("device"),
    Place("cpu"),
    Place("cpu", together=MICRO_BATCHES),
    Place("8bit", package="torchao"),
    Place("4bit", package="bitsandbytes"),
    Place("cached"),
    Place("device", ranks=2),
    Place("sharded", ranks=2),
    Place("sharded", ranks=2, together=MICRO_BATCHES),
)
QUICKLY = {"device", "8bit", "sharded x 2"}


def measured(place: Place, case: Case) -> _results.Row:
    """Memory and time of a row."""
    row: _results.Row = {"placement": place.name}
    columns = (
        "standing_gb",
        "training_gb",
        "peak_gb",
        "cpu_seconds_a_step",
        "seconds_a_step",
        "first_loss",
    )
    missing = place.package and importlib.util.find_spec(place.package) is None
    if missing or (_results.GPU and torch.cuda.device_count() < place.ranks):
        return row | dict.fromkeys(columns)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        recipe = case.write(folder)
        script = [__file__, "--train", str(recipe), *place.overrides]
        teacher = f"{{path: {folder / 'teacher'}, placement: {place.placement}}}"
        script += [f"models.teacher={teacher}", "stages.s.teacher=teacher"]
        launcher = [
            "-m",
            "torch.distributed.run",
            "--standalone",
            f"--nproc-per-node={place.ranks}",
        ]
        command = [sys.executable, *(launcher if place.ranks > 1 else []), *script]
        said = subprocess.run(command, capture_output=True, text=True, check=False)
    if said.returncode:
        raise SystemExit(f"{place.name}: {said.stderr[-3000:]}")
    told = json.loads(next(line for line in said.stdout.splitlines() if line.startswith("{")))
    return row | {name: told[name] for name in columns}


def trained(recipe: Path, overrides: list[str]) -> dict[str, float]:
    """Of this process: peaks above its imports, and medians over the steps after the first."""
    import datasets  # noqa: F401
    import peft  # noqa: F401
    import transformers.trainer as theirs
    from rich.console import Console
    from transformers import MistralForCausalLM, MixtralForCausalLM  # noqa: F401

    import dominie.training.train_stage  # noqa: F401
    from dominie.core.display import Display
    from dominie.recipe import load_recipe
    from dominie.stages.run_folder import RunFolder
    from dominie.stages.run_stages import run_stages

    class Clock(theirs.TrainerCallback):
        """Notes the time of every step, and forgets the memory that loading took."""

        def __init__(self) -> None:
            self.cpu: list[float] = []
            self.wall: list[float] = []
            self.loading = self.training = self.standing = 0.0

        def on_train_begin(self, args, state, control, **_) -> None:
            self.loading = _peak()
            settled()
            self._note()

        def on_step_end(self, args, state, control, **_) -> None:
            self._note()

        def on_train_end(self, args, state, control, **_) -> None:
            self.training = _peak()
            settled()
            self.standing = _standing()

        def _note(self) -> None:
            if _results.GPU:
                torch.cuda.synchronize()
            self.cpu.append(time.process_time())
            self.wall.append(time.perf_counter())

    clock = Clock()
    theirs.DEFAULT_CALLBACKS.append(clock)
    baseline, before = (0, 0) if _results.GPU else (resident("VmRSS") or 0, _standing())
    folder = RunFolder(load_recipe(recipe, overrides), recipe.parent / "runs")
    with folder.locked():
        run_stages(folder, Display(Console(stderr=True)))
    lines = (folder.stage("s") / "metrics.jsonl").read_text().splitlines()
    steps = [
        statistics.median(after - before for before, after in pairwise(times[1:]))
        for times in (clock.cpu, clock.wall)
    ]
    return {
        "standing_gb": round((clock.standing - before) / 1e9, 3),
        "training_gb": round((clock.training - baseline) / 1e9, 3),
        "peak_gb": round((max(clock.training, clock.loading) - baseline) / 1e9, 3),
        "cpu_seconds_a_step": round(steps[0], 2),
        "seconds_a_step": round(steps[1], 2),
        "first_loss": round(json.loads(lines[0])["loss"], 5),
    }


def _peak() -> float:
    """Most bytes held since it was last forgotten."""
    return torch.cuda.max_memory_allocated() if _results.GPU else resident("VmHWM") or 0


def _standing() -> float:
    """Bytes held now, without files that are mapped."""
    return torch.cuda.memory_allocated() if _results.GPU else resident("RssAnon") or 0


def rows(places: list[Place], case: Case) -> Iterator[_results.Row]:
    """A row for each place."""
    for place in places:
        yield measured(place, case)


def main() -> None:
    """Measure, compare, print."""
    parser = _results.parser(__doc__)
    parser.add_argument("--only", choices=[place.name for place in PLACES], help="one row")
    parser.add_argument("--no-file", action="store_true", help="leave benchmarks/results alone")
    parser.add_argument("--train", nargs="+", help="(a row's own process)")
    options = parser.parse_args()
    if options.train:
        told = trained(Path(options.train[0]), options.train[1:])
        if os.environ.get("RANK", "0") == "0":
            print(json.dumps(told), flush=True)
        return
    wanted = {options.only} if options.only else QUICKLY if options.quick else None
    places = [place for place in PLACES if wanted is None or place.name in wanted]
    case = QUICK if options.quick else FULL
    parts = _results.gathered(rows(places, case), as_json=options.json)
    note = (
        "A student of 6M parameters and a mixture of 126M for a teacher (0.50 GB in fp32),\n"
        f"{MICRO_BATCHES} micro-batches of 128 tokens a step and process, predictions alone.\n"
        "Memory is of one process above its imports: what stands between steps, without mapped\n"
        "files; the most while it trains, and at all (loading, writing the cache), with them.\n"
        "Seconds of a step are the processor's and the clock's, medians after the first. On a CPU\n"
        "main memory is the device, so that `cpu` frees nothing, and gloo copies what it gathers\n"
        "several times. `first_loss` is of the first step, which `x 2` doubles. –: not here."
    )
    options.quick |= options.no_file or options.only is not None
    _results.finish("placement", "Where a teacher lies", parts, options, note=note)


if __name__ == "__main__":
    main()
