"""Find runs and read their files: strictly for a run that goes on, tolerantly for a report.

Every reader takes `notes`. Without a list, a file that cannot be read is an `InputError`; with one,
it is left out and noted. A file that is not there is empty either way.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dominie.core.errors import InputError, nearest
from dominie.core.io import finite, sequence, text, verify_checksum

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

#: What a run writes and a recipe's folder has not.
_TRACES = (".lock", "results.json", "*/stage.json", "*/metrics.jsonl")


def is_run(path: Path) -> bool:
    """Whether a folder is a run's, finished or not; the folder of a recipe is none."""
    return any(True for trace in _TRACES for _ in path.glob(trace))


def runs_in(runs: Path) -> list[str]:
    """The names of the runs in their folder."""
    return sorted(path.name for path in runs.glob("*") if path.is_dir() and is_run(path))


def found_run(named: Path, runs: Path) -> Path:
    """Find a run by its folder, or by its name in the folder of all runs.

    If neither is a run, a folder of this name is returned: its reader says what is missing in it.

    Raises:
        InputError: there is no such folder, or it holds a recipe that has not been run.
    """
    folders = [path for path in (named, runs / named) if path.is_dir()]
    run = next((path for path in folders if is_run(path)), None)
    if run is not None:
        return run
    if not folders:
        raise no_such_run(str(named), named, runs)
    if (folders[0] / "recipe.yaml").is_file():
        raise InputError(
            "this is a recipe's folder, and not a run",
            where=str(folders[0]),
            expected="a folder that `dominie run` made, runs/NAME, or its NAME",
            do=f"`dominie run {folders[0]}` makes a run of it",
        )
    return folders[0]


def no_such_run(named: str, folder: Path, runs: Path) -> InputError:
    """The error about a run that does not exist.

    Args:
        named: as it was typed.
        folder: that it names.
        runs: the folder of all runs.
    """
    known = runs_in(runs)
    near = nearest(folder.name, known)
    return InputError(
        "there is no such run folder",
        where=named,
        expected=f"a folder, or one of {', '.join(known)} in {runs}" if known else "a run's folder",
        found=f"nothing at {folder} or {runs / folder}",
        do=f"did you mean {runs / near}?" if near else "name one as runs/NAME",
    )


_MAXIMUM_SAMPLES = 5000
_MAXIMUM_RECIPE = 60_000
#: What to do about a file that cannot be read; `{folder}` is its own.
_REMEDIES = {
    "results.json": "run `dominie evaluate` again, which writes it",
    "stage.json": "move {folder} out of the way and run again; the stage is then trained again",
    "metrics.jsonl": "take the line out; it is no more than a record of the training",
}


@dataclass(frozen=True)
class Sample:
    """One row of a task as one model answered it.

    Attributes:
        score: of the answer, from 0 to 1; None if there is no verdict on it.
        verdict: what a judge wrote about it.
        invalid: whether the answer was of another form than was asked for.
    """

    prompt: str
    target: str
    output: str
    score: float | None
    group: str | None = None
    verdict: str | None = None
    invalid: bool = False


def read_object(path: Path, notes: list[str] | None = None) -> dict[str, Any]:
    """The JSON object in a file, without the checksum that it may end in.

    Args:
        path: the file.
        notes: see the module. A tolerant reader takes an object whose checksum is wrong.

    Raises:
        InputError: there is no object in the file, or it is not as it was written.
    """
    try:
        errors = "strict" if notes is None else "replace"
        content: Any = json.loads(path.read_text(encoding="utf-8", errors=errors))
        if not isinstance(content, dict):
            raise ValueError("no JSON object")
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        return fault(path, getattr(error, "strerror", None) or str(error), notes)
    try:
        return verify_checksum(content)
    except ValueError as error:
        if notes is None:
            fault(path, str(error), notes)
        else:
            notes.append(f"{place(path)} is not as it was written; it is shown as it is now.")
    return content


def fault(path: Path, found: str, notes: list[str] | None) -> dict[str, Any]:
    """Raise about a file that cannot be read, or note it and return an empty object."""
    if notes is None:
        remedy = _REMEDIES.get(path.name, "put back a copy of the file, or move it away")
        raise InputError(
            f"{path.name} cannot be read",
            where=str(path),
            found=found,
            do=remedy.format(folder=path.parent),
        )
    notes.append(f"{place(path)} could not be read; it is left out.")
    return {}


def read_lines(
    path: Path, notes: list[str] | None = None, maximum: int | None = None
) -> Iterator[dict[str, Any]]:
    """The objects of a file of JSON lines.

    Args:
        path: the file.
        notes: see the module.
        maximum: how many lines to read at most.

    Raises:
        InputError: a line is no JSON object. The last one may be half written: it is left out.
    """
    try:
        lines = path.open(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return
    except (OSError, ValueError) as error:  # a name the file system refuses, or no right to read
        if notes is None:
            fault(path, str(error), notes)
        else:
            notes.append(f"{place(path)} could not be opened; it is left out.")
        return
    unreadable = 0
    with lines:
        for number, line in enumerate(lines):
            if maximum is not None and number >= maximum and notes is not None:
                notes.append(f"Of {place(path)} only the first {maximum:,} rows were read.")
                break
            try:
                content = json.loads(line) if line.strip() else None
            except (ValueError, RecursionError) as error:
                if notes is None and line.endswith("\n"):
                    fault(path, f"line {number + 1}: {error}", notes)
                unreadable += 1
                continue
            if isinstance(content, dict):
                yield content
    if unreadable and notes is not None:
        notes.append(
            f"{unreadable:,} line{'s' if unreadable > 1 else ''} of {place(path)} could not be "
            "read, cut off by a crash perhaps."
        )


def read_stage(folder: Path, notes: list[str] | None = None) -> dict[str, Any]:
    """`stage.json` of a stage's folder, empty if there is none.

    Raises:
        InputError: it is there and cannot be read, or is no record of a stage.
    """
    path = folder / "stage.json"
    record = read_object(path, notes)
    if notes is None and not {"fingerprint", "status"} <= record.keys() and path.exists():
        return fault(path, "no record of a stage", notes)
    return record


def read_metrics(folder: Path, notes: list[str] | None = None) -> list[dict[str, Any]]:
    """The lines of a stage's `metrics.jsonl`, as they were logged."""
    return list(read_lines(folder / "metrics.jsonl", notes))


def read_samples(path: Path, notes: list[str]) -> tuple[Sample, ...]:
    """The answers of a model to a task, as far as they can be read."""
    return tuple(
        Sample(
            text(row.get("prompt")) or "",
            text(row.get("target")) or "",
            text(row.get("output")) or "",
            _sample_score(row),
            text(row.get("group")),
            text(row.get("verdict")),
            row.get("invalid") is True,
        )
        for row in read_lines(path, notes, _MAXIMUM_SAMPLES)
    )


def _sample_score(row: Mapping[str, Any]) -> float | None:
    """The score of an answer, from 0 to 1."""
    if (score := finite(row.get("score"))) is not None:
        return min(1.0, max(0.0, score))
    if (preference := finite(row.get("preference"))) is not None:  # from 1 to 2, as AlpacaEval's
        return min(1.0, max(0.0, preference - 1.0))
    ratings = [r for each in sequence(row.get("ratings")) if (r := finite(each)) is not None]
    if ratings:  # from 1 to 10, one a turn, as MT-Bench's
        return min(1.0, max(0.0, math.fsum(ratings) / len(ratings) / 10))
    return float(row["correct"]) if isinstance(row.get("correct"), bool) else None


def read_recipe(path: Path, notes: list[str]) -> str | None:
    """The resolved recipe as text, the beginning of a long one."""
    if not path.is_file():
        notes.append("The resolved recipe is missing: there is no recipe.yaml.")
        return None
    recipe = path.read_text(encoding="utf-8", errors="replace")
    if len(recipe) > _MAXIMUM_RECIPE:
        notes.append(f"The recipe is shown in part: its first {_MAXIMUM_RECIPE:,} characters.")
    return recipe[:_MAXIMUM_RECIPE]


def place(path: Path) -> str:
    """A file as people name it inside a run folder."""
    parts = path.parts
    if "evaluation" in parts:
        return "/".join(parts[parts.index("evaluation") :])
    return path.name if path.name == "results.json" else "/".join(parts[-2:])
