"""A run that nothing disturbed, and a process that forks disturbed ones."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # importlib mode puts no folder on the path

from faults import STEPS, WHEN, Ended, Nursery, copied, outcome, write_inputs

Tally = Callable[..., None]


@pytest.fixture
def tally(record_property) -> Tally:
    """Takes down what a test did: the kind of fault, the steps that had to be made again, the end.

    The end is `same` or not (refused in one message); None where it is not told apart.
    """

    def take(kind: str, lost: int = 0, *, same: bool | None = None) -> None:
        record_property("fault", (kind, lost, same))

    return take


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """What was injected and lost, by kind, where these tests were asked for by their folder."""
    lost: dict[str, list[int]] = {}
    ends: dict[str, list[bool]] = {}
    for report in terminalreporter.getreports("passed"):
        for name, value in report.user_properties if report.when == "call" else ():
            if name == "fault":
                lost.setdefault(value[0], []).append(value[1])
                if value[2] is not None:
                    ends.setdefault(value[0], []).append(value[2])
    if lost:
        terminalreporter.section("faults injected")
        for kind, steps in sorted(lost.items()):
            if told := ends.get(kind):
                refused = len(told) - sum(told)
                terminalreporter.line(
                    f"{kind}: {len(told)}, the same {sum(told)}, refused {refused}"
                )
                continue
            terminalreporter.line(
                f"{kind}: {len(steps)}, steps made again: at most {max(steps)}, "
                f"{sum(steps) / len(steps):.2f} on average"
            )
        terminalreporter.line(f"all: {sum(map(len, lost.values()))}")


class Undisturbed(NamedTuple):
    """A finished run: its folder, how it ended, what came of it."""

    folder: Path
    ended: Ended
    outcome: dict[str, Any]


@pytest.fixture(scope="session")
def nursery(tmp_path_factory) -> Iterator[Nursery]:
    nursery = Nursery(tmp_path_factory.mktemp("nursery"))
    yield nursery
    nursery.close()


@pytest.fixture(scope="session")
def inputs(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("faults") / "inputs"
    write_inputs(folder)
    return folder


@pytest.fixture(scope="session")
def undisturbed(nursery, inputs, tmp_path_factory) -> Undisturbed:
    folder = copied(inputs, tmp_path_factory.mktemp("undisturbed") / "work")
    ended = nursery.run(folder, scout=str(nursery.folder / "modules"))
    assert ended.status == 0, ended.said
    assert ended.steps == STEPS
    return Undisturbed(folder, ended, outcome(folder / "runs" / "tiny"))


@pytest.fixture(scope="session")
def state(nursery, inputs, undisturbed, tmp_path_factory) -> Callable[[str], Path]:
    """A folder with a run as it is at a time, by the names of `WHEN`."""
    made: dict[str, Path] = {}

    def at(when: str) -> Path:
        begins = WHEN[when]
        if begins is None:
            return undisturbed.folder
        if when not in made:
            made[when] = copied(inputs, tmp_path_factory.mktemp(when) / "work")
            moments = enumerate(undisturbed.ended.moments, 1)
            number = next(n for n, moment in moments if moment.startswith(begins))
            assert nursery.run(made[when], at=number).status == -9
        return made[when]

    return at
