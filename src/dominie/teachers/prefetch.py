"""The targets of the micro-batches of a step: several at once, begun before they are asked for."""

from __future__ import annotations

from collections.abc import Sequence

from dominie.data.batch import Batch, joined
from dominie.losses.attention_rows import Projections
from dominie.losses.targets import Part, Signal
from dominie.teachers.teacher import Teacher, expect_next


class TeacherPrefetch:
    """The targets of the micro-batches of an optimiser step, a few of them in one forward pass.

    Teachers that can begin before they are asked do so while the student is at the micro-batches
    before.

    Args:
        teacher: whose targets.
        micro_batches: of the student, in a forward pass of the teacher.
    """

    def __init__(self, teacher: Teacher, micro_batches: int) -> None:
        self.teacher, self.micro_batches = teacher, micro_batches
        self._waiting: list[Batch] = []
        self._ready: list[Signal] = []

    def start_step(self, batches: Sequence[Batch]) -> None:
        """Expect the micro-batches of a step; those left of an earlier one are dropped."""
        self._waiting, self._ready = list(batches), []
        self._begin_next()

    def next(self) -> Signal:
        """The signal of the next micro-batch of the step."""
        if not self._ready:
            together = self._waiting[: self.micro_batches]
            self._waiting = self._waiting[self.micro_batches :]
            self._ready = signals(self.teacher, together)
            self._begin_next()
        return self._ready.pop(0)

    def _begin_next(self) -> None:
        following = self._waiting[: self.micro_batches]
        expect_next(self.teacher, [span for batch in following for span in batch.spans])

    def close(self) -> None:
        """End what teachers have begun."""
        self.start_step([])


def signals(teacher: Teacher, batches: Sequence[Batch]) -> list[Signal]:
    """The signal of each batch, from one forward pass over the rows of all of them."""
    if len(batches) == 1:
        return [teacher.signal(batches[0])]
    whole = joined(batches)
    signal, supervised = teacher.signal(whole), whole.supervised_by_row
    found, start = [], 0
    for batch in batches:
        rows, length = batch.input_ids.shape
        parts = [_of_rows(part, start, start + rows, length, supervised) for part in signal.parts]
        found.append(Signal(tuple(part for part in parts if part is not None)))
        start += rows
    return found


def _of_rows(
    part: Part, start: int, stop: int, length: int, supervised: Sequence[int]
) -> Part | None:
    """A part restricted to rows `start` to `stop`, of `length`; None if it has none of them.

    Args:
        part: its rows ascend.
        start: row of the joined batch that is the first of a batch.
        stop: the first behind it.
        length: of its rows.
        supervised: [rows] positions of each row of the joined batch.
    """
    rows = part.rows.tolist()
    first, last = (sum(each < row for each in rows) for row in (start, stop))
    if first == last:
        return None
    tokens = slice(*(sum(supervised[each] for each in rows[:end]) for end in (first, last)))
    return Part(
        part.rows[first:last] - start,
        None if part.target is None else part.target[tokens],
        {
            layer: Projections(
                each.query[first:last, :, :length],
                each.key[first:last, :, :length],
                each.scale,
                each.sliding_window,
            )
            for layer, each in part.attention.items()
        },
    )
