"""Which folders are runs, and the one that a person means."""

from __future__ import annotations

import difflib
from pathlib import Path

from dominie.errors import InputError

#: What a run writes and a recipe's folder has not.
_TRACES = (".lock", "results.json", "*/stage.json", "*/metrics.jsonl")


def is_run(path: Path) -> bool:
    """Whether a folder is a run's, be it under way; that of a recipe is none."""
    return any(True for trace in _TRACES for _ in path.glob(trace))


def runs_in(runs: Path) -> list[str]:
    """The names of the runs in their folder."""
    return sorted(path.name for path in runs.glob("*") if path.is_dir() and is_run(path))


def found_run(word: Path, runs: Path) -> Path:
    """The run that is meant by its folder, or by its name in the folder of all runs.

    Where neither is a run, a folder of this name is returned, for its reader to tell what it lacks.

    Raises:
        InputError: there is no such folder, or it holds a recipe that has not been run.
    """
    there = [path for path in (word, runs / word) if path.is_dir()]
    run = next((path for path in there if is_run(path)), None)
    if run is not None:
        return run
    if not there:
        raise no_such_run(str(word), word, runs)
    if (there[0] / "recipe.yaml").is_file():
        raise InputError(
            "this is a recipe's folder, and not a run",
            where=str(there[0]),
            expected="a folder that `dominie run` made, runs/NAME, or its NAME",
            do=f"`dominie run {there[0]}` makes a run of it",
        )
    return there[0]


def no_such_run(word: str, place: Path, runs: Path) -> InputError:
    """What to say of a run that is not there.

    Args:
        word: as it was typed.
        place: the folder it names.
        runs: the folder of all runs.
    """
    there = runs_in(runs)
    near = difflib.get_close_matches(place.name, there, n=1, cutoff=0.5)
    return InputError(
        "there is no such run folder",
        where=word,
        expected=f"a folder, or one of {', '.join(there)} in {runs}" if there else "a run's folder",
        found=f"nothing at {place} or {runs / place}",
        do=f"did you mean {runs / near[0]}?" if near else "name one as runs/NAME",
    )
