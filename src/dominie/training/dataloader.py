"""From tokenised rows to the micro-batches of optimiser steps."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from torch.utils.data import Dataset

from dominie.data.batch import Row, filled
from dominie.data.packing import layout
from dominie.data.sampling import Mix

#: A conversation with the index of its source.
Conversation = tuple[int, Row]
#: A micro-batch: of the step with these (source index, row index) pairs, the one of this number.
Place = tuple[Sequence[tuple[int, int]], int]


class MixedRows(Dataset[Conversation]):
    """Rows of several sources under one index, (source index, row index)."""

    def __init__(self, sources: Sequence[Sequence[Row]]) -> None:
        self.sources = list(sources)

    def __len__(self) -> int:
        return sum(len(rows) for rows in self.sources)

    def __getitem__(self, index: tuple[int, int]) -> Conversation:
        source, row = index
        return source, self.sources[source][row]


class Collator:
    """How conversations share rows and forward passes. Picklable.

    Args:
        routes: route of each source; a row has one.
        pack_to: longest row in tokens that several conversations may share; None is one to a row.
    """

    def __init__(self, routes: Sequence[int], pack_to: int | None) -> None:
        self.routes, self.pack_to = list(routes), pack_to

    def pack(
        self, conversations: Sequence[Conversation], micro_batches: int
    ) -> list[list[list[Conversation]]]:
        """The rows of so many micro-batches, and the conversations of each row."""
        laid = layout(
            [len(row.input_ids) for _, row in conversations],
            [self.routes[source] for source, _ in conversations],
            micro_batches=micro_batches,
            capacity=self.pack_to,
        )
        return [[[conversations[i] for i in row] for row in rows] for rows in laid]

    def __call__(self, rows: Sequence[Sequence[Conversation]]) -> dict[str, Any]:
        """The dictionary form of a `Batch` of these rows."""
        return filled(rows, packed=self.pack_to is not None).as_dict()


class MicroBatchSampler:
    """The batch sampler of a run: places of micro-batches, those of a step one after the other.

    Nothing is laid out here, so that a resumed run passes over what it has learnt in no time.
    """

    batch_size, drop_last = 1, False  # what accelerate asks of a batch sampler

    def __init__(self, mix: Mix) -> None:
        self.mix = mix

    def __len__(self) -> int:
        return len(self.mix) * self.mix.micro_batches

    def __iter__(self) -> Iterator[list[Place]]:
        for step in self.mix:
            for number in range(self.mix.micro_batches):
                yield [(step, number)]


class MicroBatches(Dataset[dict[str, Any]]):
    """The micro-batches of a run by their places.

    Args:
        rows: tokenised conversations.
        mix: their order.
        collator: lays those of a step out.
    """

    def __init__(self, rows: MixedRows, mix: Mix, collator: Collator) -> None:
        self.rows, self.mix, self.collator = rows, mix, collator
        self._step: Sequence[tuple[int, int]] = ()  # the one that was last laid out
        self._laid: list[list[list[Conversation]]] = []

    def __len__(self) -> int:
        return len(self.rows)  # what a run has to learn from

    def __getitem__(self, place: Place) -> dict[str, Any]:
        step, number = place
        if step != self._step:
            self._step, self._laid = step, self._laid_out(step)
        return self.collator(self._laid[number])

    def _laid_out(self, step: Sequence[tuple[int, int]]) -> list[list[list[Conversation]]]:
        if self.mix.turn != self.mix.micro_batch:
            return self._shared_out(step)
        sources = dict.fromkeys(source for source, _ in step)  # each has micro-batches of its own
        return [
            rows
            for source in sources
            for rows in self._shared_out([index for index in step if index[0] == source])
        ]

    def _shared_out(self, step: Sequence[tuple[int, int]]) -> list[list[list[Conversation]]]:
        return self.collator.pack(
            [self.rows[index] for index in step], len(step) // self.mix.micro_batch
        )


def only(batches: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The one batch that was fetched."""
    (batch,) = batches
    return batch
