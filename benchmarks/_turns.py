"""Methods that are measured side by side, by turns."""

from __future__ import annotations

import statistics
from typing import TYPE_CHECKING, NamedTuple

from _memory import is_too_large, peak_above, released, settled
from _results import GPU, told
from _speed import timed

if TYPE_CHECKING:
    from collections.abc import Callable, Collection

    from _results import Deadline, Row
    from torch import Tensor


class Turns(NamedTuple):
    """What the methods of a table came to, by their names; a failed one has only its failure.

    Attributes:
        wall: seconds of a call, round by round.
        cpu: likewise of CPU time.
        peaks: bytes above what was there before the last call.
        values: what the last call returned.
        failures: what ended a method, as two columns of its row.
    """

    wall: dict[str, list[float]]
    cpu: dict[str, list[float]]
    peaks: dict[str, float | None]
    values: dict[str, float]
    failures: dict[str, Row]


def taken_in_turns(
    methods: dict[str, Callable[[], Tensor]],
    rounds: int,
    deadline: Deadline,
    *,
    calls: int = 1,
    once: Collection[str] = (),
) -> Turns:
    """Run the methods one after the other, so many rounds and, of several, one more to warm up.

    Args:
        methods: each returns a number to compare them by.
        rounds: after the deadline no further one is begun, but the first always is.
        deadline: for the rounds.
        calls: of a method in a round, on a GPU.
        once: methods that take too long to be warmed up or repeated.
    """
    turns = Turns({name: [] for name in methods}, {name: [] for name in methods}, {}, {}, {})
    warming = int(rounds > 1)
    for turn in range(rounds + warming):
        if turn > warming and deadline.passed:
            break
        for name, method in methods.items():
            if name in turns.failures or (name in once and turn):
                continue
            before = settled()
            try:
                wall, cpu, value = timed(method, calls if GPU and turn >= warming else 1)
            except Exception as error:
                turns.failures[name] = _told(error)  # the error itself holds tensors
            else:
                turns.values[name], turns.peaks[name] = value.item(), peak_above(before)
                if turn >= warming or name in once:
                    turns.wall[name].append(wall)
                    turns.cpu[name].append(cpu)
            if name in turns.failures:
                released()
    return turns


def notes(turns: Turns, name: str) -> Row:
    """The columns that tell of a method's failure."""
    return {"note": None, "wrong": None, **turns.failures.get(name, {})}


def _told(error: BaseException) -> Row:
    """What does not fit into memory is nothing wrong."""
    return {"note": "does not fit"} if is_too_large(error) else {"wrong": told(error)}


def median(seconds: list[float], digits: int) -> float | None:
    """Rounded; None without any."""
    return round(statistics.median(seconds), digits) if seconds else None


def ratio(own: list[float], other: list[float]) -> float | None:
    """Median of the ratios of the rounds; of the medians where one took part in fewer."""
    if not own or not other:
        return None
    if len(own) != len(other):
        return round(statistics.median(own) / statistics.median(other), 3)
    return round(statistics.median(a / b for a, b in zip(own, other, strict=True)), 3)
