"""What teachers say about a batch, as the losses take it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from dominie.losses.attention import Projections
from dominie.losses.vocabulary import Head, SparseTarget

Target = tuple[Tensor, Head] | SparseTarget


def of_tokens(target: Target, index: Tensor | slice) -> Target:
    """The same target on some of its supervised positions."""
    if isinstance(target, SparseTarget):
        return target[index]
    hidden, head = target
    return hidden[index], head


@dataclass(frozen=True)
class Part:
    """One teacher's word on some rows of a batch.

    Attributes:
        rows: [R] indices of the batch rows it speaks about.
        target: (hidden [n, D_t], head) or sparse probabilities, one entry for each supervised
            position of those rows in row-major order; None where only attention was asked for.
        attention: teacher layer → query and key after rotary embedding, batch dimension R.
    """

    rows: Tensor
    target: Target | None
    attention: Mapping[int, Projections] = field(default_factory=dict)


@dataclass(frozen=True)
class Signal:
    """The parts of a batch that have a teacher; no row stands in two of them."""

    parts: tuple[Part, ...] = ()
