"""Teachers that speak on several of the student's micro-batches at once.

A forward of an offloaded or sharded teacher costs the moving of all its weights, however many rows
it reads; and a teacher without a backward pass has room for more rows than the student.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from dominie.data.batches import Batch, joined
from dominie.losses.attention import Projections
from dominie.losses.signal import Part, Signal, of_tokens
from dominie.teachers.base import Teacher


class Ahead:
    """What a teacher says on the micro-batches of an optimiser step, taken a few at a time.

    Args:
        teacher: who speaks.
        micro_batches: of the student, in a forward pass of the teacher.
    """

    def __init__(self, teacher: Teacher, micro_batches: int) -> None:
        self.teacher, self.micro_batches = teacher, micro_batches
        self._unspoken: list[Batch] = []
        self._spoken: list[Signal] = []

    def begin(self, batches: Sequence[Batch]) -> None:
        """Expect the micro-batches of a step; what is left of an earlier one is forgotten."""
        self._unspoken, self._spoken = list(batches), []

    def next(self) -> Signal:
        """The signal of the next micro-batch of the step."""
        if not self._spoken:
            together = self._unspoken[: self.micro_batches]
            self._unspoken = self._unspoken[self.micro_batches :]
            self._spoken = signals(self.teacher, together)
        return self._spoken.pop(0)


def signals(teacher: Teacher, batches: Sequence[Batch]) -> list[Signal]:
    """The signal of each batch, from one forward pass over the rows of all of them."""
    if len(batches) == 1:
        return [teacher.signal(batches[0])]
    whole = joined(batches)
    spoken, supervised = teacher.signal(whole), whole.supervised.sum(1)
    found, start = [], 0
    for batch in batches:
        rows, length = batch.input_ids.shape
        parts = [_of_rows(part, start, start + rows, length, supervised) for part in spoken.parts]
        found.append(Signal(tuple(part for part in parts if part is not None)))
        start += rows
    return found


def _of_rows(
    part: Part, start: int, stop: int, length: int, supervised: torch.Tensor
) -> Part | None:
    """What a part says on rows `start` to `stop`, of `length`; None where that is nothing.

    Args:
        part: its rows ascend.
        start: row of the joined batch that is the first of a batch.
        stop: the first behind it.
        length: of its rows.
        supervised: [rows] positions of each row of the joined batch.
    """
    first, last = (int((part.rows < row).sum()) for row in (start, stop))
    if first == last:
        return None
    ends = supervised[part.rows].cumsum(0).tolist()
    tokens = slice(ends[first - 1] if first else 0, ends[last - 1])
    return Part(
        part.rows[first:last] - start,
        None if part.target is None else of_tokens(part.target, tokens),
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
