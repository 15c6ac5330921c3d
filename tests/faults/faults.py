"""Faults done to a run, and what may come of it: the same end, or one clear message."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dominie.toyworld.toy_models import save_model

#: Every kind of file that a run writes, in some two seconds.
RECIPE = """
name: tiny
data: {d: {path: d.jsonl, validation_fraction: 0.1, test_fraction: 0.2}}
train:
  {learning_rate: 1e-3, steps: 4, batch: 2, max_length: 32, checkpoint_every: 2, evaluate_every: 4}
stages:
  first: {student: m, data: {d: 1.0}, loss: {next_token: 1.0}}
  second: {student: m, teacher: first, data: {d: 1.0}, loss: {prediction: 1.0}, cache: true}
  merged: {merge: {models: {first: 0.5, second: 0.5}}}
evaluate:
  models: {second: second}
  tasks: {t: {source: d, max_new_tokens: 4}}
"""
#: What every run finds in its environment.
SECRETS = {
    "HF_TOKEN": "hf_UTJrzVwqkDnYxaSecretOfTheHub",
    "OPENAI_API_KEY": "sk-proj-8Qm4SecretOfTheJudge",
    "WANDB_API_KEY": "c0ffee5ec4e7ab5ec4e7",
}
STAGES = ("first", "second", "merged")
STEPS, INTERVAL = 8, 2  # of both trained stages; between two checkpoints
#: When a run is killed to be damaged, by the moment's beginning; None when it is done.
WHEN = {
    "prepared": "mkdir first/checkpoints",
    "cached": "mkdir second/checkpoints",
    "training": "rename second/checkpoints/.writing/checkpoint-4",
    "done": None,
}

_ROWS = [
    {
        "messages": [
            {"role": "user", "content": f"copy {i} {7 * i}"},
            {"role": "assistant", "content": "red"},
        ]
    }
    for i in range(40)
]
_TIMES = {"seconds", "tokens_per_second", "throughput"}


def write_inputs(folder: Path) -> None:
    """A recipe, its data and the model it starts from."""
    folder.mkdir(parents=True)
    (folder / "r.yaml").write_text(RECIPE)
    (folder / "d.jsonl").write_text("".join(json.dumps(row) + "\n" for row in _ROWS))
    save_model("student", folder / "m", seed=0)


@dataclass(frozen=True)
class Ended:
    """How a process ended.

    Attributes:
        status: of its exit; minus the signal that killed it.
        said: all that it printed.
        steps: optimiser steps that it made.
        moments: the boundaries it came by, `open stage/model/config.json` say.
    """

    status: int
    said: str
    steps: int
    moments: tuple[str, ...]


class Nursery:
    """Runs `dominie` in forks of one process that has imported everything.

    Args:
        folder: for what the forks say.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        environment = {
            "OMP_NUM_THREADS": "1",
            "CUDA_VISIBLE_DEVICES": "",
            "HF_HUB_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "false",
            **SECRETS,
        }
        self._process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("nursery.py"))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env={**os.environ, **environment},
        )

    def close(self) -> None:
        """End it."""
        self._process.communicate()

    def run(
        self,
        cwd: Path,
        *arguments: str,
        at: int | None = None,
        how: str = "kill",
        root: Path | None = None,
        **options: Any,
    ) -> Ended:
        """One `dominie`, `run r.yaml` unless told otherwise, with a fault on its way or without.

        Args:
            cwd: its folder.
            arguments: of the command line.
            at: the boundary at which the fault strikes, from 1.
            how: see `nursery.Boundaries`.
            root: the folder whose boundaries count; the run's.
            options: `file_size`, a limit; `environment`; `scout`.
        """
        files = {name: self.folder / name for name in ("said", "steps", "log")}
        for file in files.values():
            file.unlink(missing_ok=True)
        order = {
            "cwd": str(cwd),
            "arguments": list(arguments or ("run", "r.yaml")),
            "root": str((root or cwd / "runs" / "tiny").resolve()),
            "at": at,
            "how": how,
            **{name: str(file) for name, file in files.items()},
            **options,
        }
        assert self._process.stdin, "a pipe"
        assert self._process.stdout, "a pipe"
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()
        status = json.loads(self._process.stdout.readline())["status"]
        return Ended(
            status,
            files["said"].read_text(errors="replace"),
            files["steps"].stat().st_size if files["steps"].exists() else 0,
            tuple(files["log"].read_text().splitlines()) if files["log"].exists() else (),
        )


def outcome(run: Path) -> dict[str, Any]:
    """What two runs must have in common: weights to the bit, scores, and metrics without times."""
    found: dict[str, Any] = {"results": json.loads((run / "results.json").read_text())}
    for stage in STAGES:
        weights = (run / stage / "model" / "model.safetensors").read_bytes()
        found[stage] = hashlib.sha256(weights).hexdigest()
        metrics = run / stage / "metrics.jsonl"
        lines = metrics.read_text(errors="replace").splitlines() if metrics.exists() else []
        found[f"{stage}/metrics.jsonl"] = [*map(_without_times, lines)]
    return found


def _without_times(line: str) -> Any:
    try:
        return {key: value for key, value in json.loads(line).items() if key not in _TIMES}
    except ValueError:
        return line


def wrong(ended: Ended, run: Path, good: dict[str, Any], *words: str) -> list[str]:
    """What is wrong with a run after a fault, nothing where it came to the same end.

    It may also fail with one message that has these words in it; and curves may be damaged whose
    file it names.
    """
    if ended.status != 0:
        told = complaint(ended, words)
        return [f"{told}: {ended.said[-1500:]}"] if told else []
    if "Traceback" in ended.said:
        return ["a traceback"]
    found = outcome(run)
    named = {part for part in good if part in ended.said}
    return [f"{part} differs" for part in good if found[part] != good[part] and part not in named]


def complaint(ended: Ended, words: Sequence[str] = ()) -> str | None:
    """What is wrong with the way in which a process failed; None where it told a person why."""
    errors = [line for line in ended.said.splitlines() if line.startswith("error: ")]
    if "Traceback" in ended.said:
        return "a traceback"
    if ended.status not in (1, 2) or len(errors) != 1:
        return f"status {ended.status} with {len(errors)} messages"
    if "\n  do  " not in ended.said or "report this" in ended.said:
        return "no word about what to do"
    absent = [word for word in words if word not in ended.said]
    return f"no word of {', '.join(absent)}" if absent else None


def damage(path: Path, how: str, at: float = 0.5) -> None:
    """Flip a bit of a file, cut it off, empty it or delete it.

    Args:
        path: the file.
        how: `flip`, `cut`, `empty` or `delete`.
        at: where, as a share of its length.
    """
    if how == "delete":
        path.unlink()
        return
    content = bytearray(path.read_bytes())
    place = min(int(len(content) * at), max(len(content) - 1, 0))
    if how == "flip" and content:
        content[place] ^= 1 << (place % 7)
    elif how == "cut":
        del content[place:]
    elif how == "empty":
        content.clear()
    path.unlink()  # and not through a link
    path.write_bytes(content)


def copied(folder: Path, target: Path) -> Path:
    """A copy of a folder with a run in it."""
    return Path(shutil.copytree(folder, target, symlinks=True))
