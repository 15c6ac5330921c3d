"""The order of the conversations of a run, and the micro-batches of its optimiser steps."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Dataset

from dominie.core.distributed import rank, world_size
from dominie.data.batch import Batch, Padding, Row, Span, filled
from dominie.data.layout import layout
from dominie.training.settings import Mixing

#: A conversation with the index of its source.
IndexedRow = tuple[int, Row]


class StepSource(Protocol):
    """Where the micro-batches of each optimiser step come from.

    All ranks hold one and ask it for different micro-batches of the same step. What it returns
    depends on the step and the number alone, so that a run that is resumed asks for the steps that
    are left and gets what it would have got.
    """

    @property
    def sources(self) -> Sequence[str]:
        """Names of the sources, by the index that `Batch.source_ids` holds."""

    @property
    def steps(self) -> int:
        """Optimiser steps of the run."""

    @property
    def micro_batches(self) -> int:
        """Micro-batches of a step, over all ranks."""

    @property
    def one_source_per_step(self) -> bool:
        """Whether the conversations of a step are all of one source."""

    def __len__(self) -> int:
        """Conversations there are to learn from, for display."""

    def micro_batch(self, step: int, number: int) -> Batch:
        """One micro-batch of an optimiser step; both are counted from 0."""

    def conversations(self, step: int) -> list[dict[str, Any]]:
        """The conversations of a step for a message: each one's `source`, `row` and `tokens`."""


class Collator:
    """Lays conversations out in rows and forward passes. Picklable.

    Args:
        routes: route of each source; a row has one.
        pack_to: longest row in tokens that several conversations may share; None is one to a row.
        padding: how long rows are made; None is as long as the longest.
    """

    def __init__(
        self, routes: Sequence[int], pack_to: int | None, padding: Padding | None = None
    ) -> None:
        self.routes, self.pack_to, self.padding = list(routes), pack_to, padding

    def pack(
        self, conversations: Sequence[IndexedRow], micro_batches: int
    ) -> list[list[list[IndexedRow]]]:
        """The rows of so many micro-batches, and the conversations of each row."""
        packed = layout(
            [len(row.input_ids) for _, row in conversations],
            [self.routes[source] for source, _ in conversations],
            micro_batches=micro_batches,
            capacity=self.pack_to,
        )
        return [[[conversations[i] for i in row] for row in rows] for rows in packed]

    def __call__(self, rows: Sequence[Sequence[IndexedRow]]) -> Batch:
        """A batch of these rows."""
        return filled(rows, self.padding)


def total_conversations(
    sizes: Mapping[str, int], shares: Mapping[str, float], epochs: float
) -> int:
    """How many conversations make `epochs` passes over the largest source of the mix."""
    active = [name for name in shares if shares[name] > 0]
    largest = max(active, key=lambda name: sizes[name])
    return math.ceil(epochs * sizes[largest] * sum(shares.values()) / shares[largest])


class Mix:
    """The whole run's order of conversations, cut into optimiser steps.

    Every optimiser step takes `batch` conversations. Sources take turns by the conversation, by the
    micro-batch or by the step. After any number of turns each source has had its share of them to
    within one turn: the fraction is exact over the run, not only in expectation. Each source is
    drawn without replacement and reshuffled on every pass. The order is a function of the arguments
    alone.

    Args:
        sizes: conversations in each source.
        shares: fraction of conversations from each source; normalised to sum to one.
        batch: conversations in an optimiser step, over all ranks.
        micro_batch: conversations in a turn where sources take turns by the micro-batch; divides
            `batch`.
        steps: optimiser steps in the run.
        seed: of the shuffles.
        mixing: what a turn is.

    Iterating yields the steps as lists of (source index, row index).
    """

    def __init__(
        self,
        sizes: Mapping[str, int],
        shares: Mapping[str, float],
        *,
        batch: int,
        micro_batch: int,
        steps: int,
        seed: int,
        mixing: Mixing = "conversations",
    ) -> None:
        self.turn = {"conversations": 1, "micro_batches": micro_batch, "steps": batch}[mixing]
        self.sizes = [sizes[name] for name in shares]
        weights = np.array(list(shares.values()), dtype=np.float64)
        self.shares: NDArray[np.float64] = weights / weights.sum()
        self.batch, self.micro_batch, self.steps, self.seed = batch, micro_batch, steps, seed

    def __len__(self) -> int:
        return self.steps

    @property
    def micro_batches(self) -> int:
        """Of a step, over all ranks."""
        return self.batch // self.micro_batch

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        rows = [self._rows(source) for source in range(len(self.sizes))]
        for turns in self._steps():
            sources = np.repeat(turns, self.turn)
            yield [(int(source), next(rows[source])) for source in sources]

    def counts(self, most: int) -> Iterator[list[int]]:
        """Conversations of each source in each of the first steps, at most so many of these."""
        for turns in islice(self._steps(), most):
            yield (np.bincount(turns, minlength=len(self.sizes)) * self.turn).tolist()

    def _steps(self) -> Iterator[NDArray[np.int64]]:
        """Whose turns the steps consist of, shuffled within each step."""
        order = np.random.default_rng([self.seed, 0])
        given = np.zeros(len(self.sizes), dtype=np.int64)
        for _ in range(self.steps):
            counts = np.zeros_like(given)
            for _ in range(self.batch // self.turn):
                source = self._next_source(given)
                given[source] += 1
                counts[source] += 1
            yield order.permutation(np.repeat(np.arange(len(counts)), counts))

    def _next_source(self, given: NDArray[np.int64]) -> int:
        """Whose turn it is: of the sources that have fallen behind, the one that is due first.

        Keeps every source within one turn of its share (Tijdeman, The chairman assignment
        problem, 1980).
        """
        if len(given) == 1:
            return 0
        slack = 1.0 / (2 * len(given) - 2)
        behind = self.shares * (given.sum() + 1) - given >= slack - 1e-9
        with np.errstate(divide="ignore"):
            due = (given + 1 - slack) / self.shares
        return int(np.argmin(np.where(behind, due, np.inf)))

    def _rows(self, source: int) -> Iterator[int]:
        shuffle = np.random.default_rng([self.seed, 1, source])
        while True:
            yield from map(int, shuffle.permutation(self.sizes[source]))


class FixedRows:
    """A step source over rows that are there from the start, in the order of a mix.

    Args:
        rows: tokenised conversations by the name of their source.
        mix: their order.
        collator: lays those of a step out.
    """

    def __init__(self, rows: Mapping[str, Sequence[Row]], mix: Mix, collator: Collator) -> None:
        self.rows, self.mix, self.collator = dict(rows), mix, collator
        self.sources, self.steps, self.micro_batches = list(rows), mix.steps, mix.micro_batches
        self.one_source_per_step = mix.turn == mix.batch
        self._by_index = list(self.rows.values())
        self._order: Iterator[list[tuple[int, int]]] = iter(())
        self._next = mix.steps  # the step that the order yields next
        self._laid: tuple[int, list[list[list[IndexedRow]]]] = (-1, [])

    def __len__(self) -> int:
        return sum(len(rows) for rows in self._by_index)

    def __getstate__(self) -> dict[str, Any]:  # a worker begins an order of its own
        return vars(self) | {"_order": iter(()), "_next": self.mix.steps}

    def micro_batch(self, step: int, number: int) -> Batch:
        """One micro-batch; a step is laid out once for all of its own."""
        if step != self._laid[0]:
            rows = [(source, self.row(source, row)) for source, row in self.indices(step)]
            self._laid = step, self.lay_out(rows)
        return self.collator(self._laid[1][number])

    def conversations(self, step: int) -> list[dict[str, Any]]:
        """The conversations of a step, over all ranks."""
        return [
            {
                "source": self.sources[source],
                "row": row,
                "tokens": len(self.row(source, row).input_ids),
            }
            for source, row in self.indices(step)
        ]

    def row(self, source: int, row: int) -> Row:
        """A conversation by the index of its source and its own there."""
        return self._by_index[source][row]

    def indices(self, step: int) -> list[tuple[int, int]]:
        """(source index, row index) of a step; the order is run through up to it, unread."""
        if step < self._next:
            self._order, self._next = iter(self.mix), 0
        while True:
            indices, self._next = next(self._order), self._next + 1
            if self._next > step:
                return indices

    def lay_out(self, step: Sequence[IndexedRow]) -> list[list[list[IndexedRow]]]:
        """The micro-batches of a step, rows and conversations of each.

        Args:
            step: its conversations in the order of `indices`.
        """
        if self.mix.turn != self.mix.micro_batch:
            return self._packed(step)
        sources = dict.fromkeys(source for source, _ in step)  # each has micro-batches of its own
        return [
            rows
            for source in sources
            for rows in self._packed([each for each in step if each[0] == source])
        ]

    def _packed(self, rows: Sequence[IndexedRow]) -> list[list[list[IndexedRow]]]:
        return self.collator.pack(rows, len(rows) // self.mix.micro_batch)


class MicroBatchSampler:
    """The batch sampler of a run: (step, number) of each micro-batch in a list of its own.

    Nothing is made here, so that a resumed run passes over its first steps in no time.
    """

    batch_size, drop_last = 1, False  # attributes that accelerate reads of a batch sampler

    def __init__(self, source: StepSource) -> None:
        self.source = source

    def __len__(self) -> int:
        return self.source.steps * self.source.micro_batches

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for step in range(self.source.steps):
            for number in range(self.source.micro_batches):
                yield [(step, number)]


class MicroBatches(Dataset[dict[str, Any]]):
    """The micro-batches of a step source as a data loader's dataset: dictionaries with `number`.

    Of a source whose student answers conversations itself they are those of the data.
    """

    def __init__(self, source: StepSource) -> None:
        self.source: StepSource = getattr(source, "planned", source)
        self._own: Sequence[float] = getattr(getattr(source, "plan", None), "fractions", ())

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: tuple[int, int]) -> dict[str, Any]:
        return {**self.source.micro_batch(*index).as_dict(), "number": index[1]}

    def first_spans(self, step: int, micro_batches: int) -> list[Span]:
        """The conversations of this rank's first micro-batches of a step, as the data have them.

        Those of sources that the student answers itself are left out.

        Args:
            step: counted from 0; after the last one there are none.
            micro_batches: so many of this rank.
        """
        if step >= self.source.steps:
            return []
        numbers = range(rank(), self.source.micro_batches, world_size())[:micro_batches]
        found = [s for number in numbers for s in self.source.micro_batch(step, number).spans]
        return [span for span in found if not (self._own and self._own[span.source])]


def unwrap(batches: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The one micro-batch that was fetched."""
    (batch,) = batches
    return batch


def micro_batch_loader(
    dataset: Dataset[dict[str, Any]], source: StepSource, arguments: Any
) -> DataLoader[Any]:
    """A data loader over the micro-batches of all steps, in order."""
    return DataLoader(
        dataset,
        batch_sampler=MicroBatchSampler(source),
        collate_fn=unwrap,
        num_workers=arguments.dataloader_num_workers,
        pin_memory=arguments.dataloader_pin_memory and arguments.device.type == "cuda",
    )
