"""Domain Alignment from Expert: every row goes to the teacher of its source."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import torch

from dominie.data.batch import Batch, joined
from dominie.losses.attention_rows import Projections
from dominie.losses.targets import Part, Signal
from dominie.teachers.teacher import LocalTeacher, Teacher


class RoutedTeacher:
    """Sends each row to its teacher *before* any forward pass, so that no row is computed twice.

    Args:
        teachers: teachers by name.
        routes: for each source index the name of its teacher, None for a source without one.
    """

    def __init__(self, teachers: Mapping[str, Teacher], routes: Sequence[str | None]) -> None:
        self.teachers = dict(teachers)
        self.names = list(teachers)
        self.routes = [-1 if name is None else self.names.index(name) for name in routes]

    def signal(self, batch: Batch) -> Signal:
        """The parts of all teachers; `rows` of each are rows of `batch`.

        Raises:
            ValueError: a row holds conversations of two teachers (it was packed without routes).
        """
        table = torch.tensor(self.routes, device=batch.source_ids.device)
        token_routes = torch.where(batch.source_ids >= 0, table[batch.source_ids.clamp(min=0)], -2)
        row_routes = token_routes.amax(dim=1)
        if bool(((token_routes != row_routes[:, None]) & (token_routes != -2)).any()):
            raise ValueError("a packed row holds conversations of two teachers")
        parts: list[Part] = []
        elsewhere = self._needed_by_any_rank(row_routes)
        for index, name in enumerate(self.names):
            rows, teacher = (row_routes == index).nonzero().squeeze(1), self.teachers[name]
            if len(rows):
                signal = teacher.signal(batch.select(rows))
                parts += [dataclasses.replace(part, rows=rows[part.rows]) for part in signal.parts]
            elif isinstance(teacher, LocalTeacher) and name in elsewhere:
                teacher.run_along(rows.device)
        return Signal(tuple(parts))

    def _needed_by_any_rank(self, row_routes: torch.Tensor) -> set[str]:
        """The teachers that need all ranks, if any rank has rows for them."""
        together = [
            (index, name)
            for index, name in enumerate(self.names)
            if getattr(self.teachers[name], "needs_all_ranks", False)
        ]
        if not together:
            return set()
        wanted = torch.stack([(row_routes == index).any() for index, _ in together]).int()
        torch.distributed.all_reduce(wanted, op=torch.distributed.ReduceOp.MAX)
        return {
            name for (_, name), any_rank in zip(together, wanted.tolist(), strict=True) if any_rank
        }


class TeacherPrefetch:
    """The targets of the micro-batches of an optimiser step, a few of them in one forward pass.

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

    def next(self) -> Signal:
        """The signal of the next micro-batch of the step."""
        if not self._ready:
            together = self._waiting[: self.micro_batches]
            self._waiting = self._waiting[self.micro_batches :]
            self._ready = signals(self.teacher, together)
        return self._ready.pop(0)


def signals(teacher: Teacher, batches: Sequence[Batch]) -> list[Signal]:
    """The signal of each batch, from one forward pass over the rows of all of them."""
    if len(batches) == 1:
        return [teacher.signal(batches[0])]
    whole = joined(batches)
    signal, supervised = teacher.signal(whole), whole.supervised.sum(1)
    found, start = [], 0
    for batch in batches:
        rows, length = batch.input_ids.shape
        parts = [_of_rows(part, start, start + rows, length, supervised) for part in signal.parts]
        found.append(Signal(tuple(part for part in parts if part is not None)))
        start += rows
    return found


def _of_rows(
    part: Part, start: int, stop: int, length: int, supervised: torch.Tensor
) -> Part | None:
    """A part restricted to rows `start` to `stop`, of `length`; None if it has none of them.

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
