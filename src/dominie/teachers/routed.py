"""Domain Alignment from Expert in one class: every row goes to the teacher of its source."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import torch

from dominie.data.batches import Batch
from dominie.losses.signal import Part, Signal
from dominie.teachers.base import Teacher
from dominie.teachers.local import LocalTeacher


class RoutedTeacher:
    """Sends each row to its teacher *before* any forward pass, so that no row is computed twice.

    Args:
        teachers: teachers by name.
        routes: for each source index the name of its teacher, None for a source that is not taught.
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
        elsewhere = self._wanted_by_any_rank(row_routes)
        for index, name in enumerate(self.names):
            rows, teacher = (row_routes == index).nonzero().squeeze(1), self.teachers[name]
            if len(rows):
                spoken = teacher.signal(batch.select(rows))
                parts += [dataclasses.replace(part, rows=rows[part.rows]) for part in spoken.parts]
            elif isinstance(teacher, LocalTeacher) and name in elsewhere:
                teacher.accompany(rows.device)
        return Signal(tuple(parts))

    def _wanted_by_any_rank(self, row_routes: torch.Tensor) -> set[str]:
        """The teachers that need all ranks, where any has rows for them."""
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
