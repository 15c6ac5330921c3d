"""A student's forward pass as the terms of a loss see it, and factors by source.

Which tokens are scored, and which of them belong together, is told beside the tensors and without
them: to find it in a tensor of a GPU, the CPU would have to wait for it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple, Protocol

import torch
from torch import Tensor

from dominie.losses.tiles import sum_precision

if TYPE_CHECKING:
    from dominie.losses.heads import Head
    from dominie.losses.router_losses import Routing
    from dominie.losses.targets import Signal


class BySource:
    """One number for each source, copied to a device once."""

    def __init__(self, values: Iterable[float]) -> None:
        self.values = list(values)
        self._copies: dict[tuple[torch.device, torch.dtype], Tensor] = {}

    def __bool__(self) -> bool:
        return any(self.values)

    def on(self, device: torch.device, dtype: torch.dtype) -> Tensor:
        """[sources] on a device."""
        key = (device, dtype)
        if key not in self._copies:
            self._copies[key] = torch.tensor(self.values, dtype=dtype, device=device)
        return self._copies[key]

    def of_tokens(self, source_ids: Tensor, weights: Tensor | None, dtype: torch.dtype) -> Tensor:
        """The number of each token's source, times the token's own weight where there are any.

        Args:
            source_ids: any shape; padding (negative) reads the first source.
            weights: the same shape; None is 1 everywhere.
            dtype: of the result.
        """
        found = self.on(source_ids.device, dtype)[source_ids.clamp(min=0)]
        return found if weights is None else found * weights.to(dtype)


class Span(Protocol):
    """A conversation's place in a batch [B, L]."""

    @property
    def row(self) -> int:
        """Of the batch."""

    @property
    def start(self) -> int:
        """Its first position in the row."""

    @property
    def tokens(self) -> int:
        """How many positions it takes."""

    @property
    def source(self) -> int:
        """Index of its source."""

    @property
    def supervised(self) -> int:
        """How many of its positions are scored."""


class _Found(NamedTuple):
    """A `Span` that was read from tensors."""

    row: int
    start: int
    tokens: int
    source: int
    supervised: int


def joined_ranges(ranges: Iterable[tuple[int, int]], device: torch.device) -> Tensor:
    """[n] the whole numbers of ascending ranges (start, stop), made on a device without a copy."""
    joined: list[tuple[int, int]] = []
    for start, stop in ranges:
        if joined and joined[-1][1] == start:
            joined[-1] = joined[-1][0], stop
        else:
            joined.append((start, stop))
    parts = [torch.arange(*each, device=device) for each in joined]
    return torch.cat(parts) if parts else torch.arange(0, device=device)


@dataclass(frozen=True, eq=False)
class ForwardPass:
    """A student's forward pass over a batch, and what its teachers returned for it.

    Attributes:
        hidden: [B, L, D] last hidden states of the student.
        head: the student's output projection.
        labels: [B, L] next token where supervised, negative elsewhere.
        source_ids: [B, L] index of each token's source, −1 on padding.
        segment_ids: [B, L] which conversation of its row a token belongs to.
        weights: [B, L] factor of each position in every term; None is 1 everywhere.
        signal: the teachers' targets, None where no source has a teacher.
        attention: scalar, the divergence of the attention maps, whose rows are already weighted
            (`AttentionLoss.row_weights`); None where there are no maps.
        routing: of each layer of a mixture of experts, what its router did.
        metrics: whether to compute what is logged and moves nothing.
        scored: [N] the supervised positions, ascending, of the B·L; None finds them.
        spans: the conversations, row by row; None finds them. Of a batch on a GPU, finding either
            means waiting for it.
    """

    hidden: Tensor
    head: Head
    labels: Tensor
    source_ids: Tensor
    segment_ids: Tensor | None = None
    weights: Tensor | None = None
    signal: Signal | None = None
    attention: Tensor | None = None
    routing: Sequence[Routing] = ()
    metrics: bool = True
    scored: Tensor | None = None
    spans: Sequence[Span] | None = None

    @cached_property
    def positions(self) -> Tensor:
        """[N] indices of the supervised positions among the B·L."""
        if self.scored is not None:
            return self.scored
        return (self.labels >= 0).flatten().nonzero().squeeze(1)

    @cached_property
    def conversations(self) -> Sequence[Span]:
        """The conversations of the batch, row by row: their supervised positions are in order."""
        if self.spans is not None:
            return self.spans
        segments = torch.zeros_like(self.labels) if self.segment_ids is None else self.segment_ids
        found: list[_Found] = []
        columns = torch.stack([self.source_ids, segments, (self.labels >= 0).long()], dim=2)
        for row, tokens in enumerate(columns.tolist()):
            last = None
            for place, (source, segment, scored) in enumerate(tokens):
                if source < 0:
                    last = None
                elif segment == last:
                    span = found[-1]
                    more = span.supervised + scored
                    found[-1] = span._replace(tokens=span.tokens + 1, supervised=more)
                else:
                    found.append(_Found(row, place, 1, source, scored))
                    last = segment
        return found

    @cached_property
    def real(self) -> Tensor:
        """[R] indices of the tokens that are none of the padding, among the B·L."""
        length = self.labels.shape[1]
        starts = [(span.row * length + span.start, span.tokens) for span in self.conversations]
        return joined_ranges(((at, at + count) for at, count in starts), self.labels.device)

    @cached_property
    def supervised_hidden(self) -> Tensor:
        """[N, D] hidden states of the supervised positions."""
        return self.hidden.flatten(0, 1)[self.positions]

    @cached_property
    def supervised_labels(self) -> Tensor:
        """[N] their next tokens."""
        return self.labels.flatten()[self.positions]

    @cached_property
    def supervised_sources(self) -> Tensor:
        """[N] the index of their source."""
        return self.source_ids.flatten()[self.positions]

    def coefficients(self, by_source: BySource) -> Tensor:
        """[N] factor of each supervised position in a term with these weights."""
        weights = None if self.weights is None else self.weights.flatten()[self.positions]
        dtype = sum_precision(self.hidden.dtype)
        return by_source.of_tokens(self.supervised_sources, weights, dtype)
