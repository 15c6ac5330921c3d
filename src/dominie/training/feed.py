"""From tokenised rows to the batches a training step reads."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch.utils.data import Dataset

from dominie.data.batches import Row, collate


class MixedRows(Dataset[tuple[int, Row]]):
    """Rows of several sources under one index, (source index, row index)."""

    def __init__(self, sources: Sequence[Sequence[Row]]) -> None:
        self.sources = list(sources)

    def __len__(self) -> int:
        return sum(len(rows) for rows in self.sources)

    def __getitem__(self, index: tuple[int, int]) -> tuple[int, Row]:
        source, row = index
        return source, self.sources[source][row]


class Collator:
    """Picklable collation into the dictionary form of a `Batch`."""

    def __init__(self, routes: Sequence[int], pack_to: int | None) -> None:
        self.routes, self.pack_to = list(routes), pack_to

    def __call__(self, rows: Sequence[tuple[int, Row]]) -> dict[str, Any]:
        """One micro-batch of (source index, conversation) pairs."""
        return collate(rows, routes=self.routes, pack_to=self.pack_to).as_dict()
