"""The loss of a stage: iterates over its terms and sums them, once, over the supervised tokens.

The loss is a *sum* over supervised positions. Whoever steps divides once, by the supervised tokens
of the whole optimiser step, so that micro-batches, ranks, padding and packing cannot change the
objective.

A term is a settings class (:class:`Term`: what it needs) and a :class:`Computation` (how it is
computed, what it logs). To add one, write both in one file and add a field to
`dominie.losses.terms.LossTerms`; nothing else knows the terms by name.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol, TypeVar

import torch
from torch import Tensor

if TYPE_CHECKING:
    from dominie.losses.forward_pass import ForwardPass
    from dominie.losses.terms import LossTerms

#: What a term is computed from: the labels of the data, a teacher's next-token distribution, a
#: teacher's attention, or the logits of the student's router.
Need = Literal["labels", "distribution", "attention", "router"]

ComputationT = TypeVar("ComputationT")


@dataclass(frozen=True)
class Column:
    """A value that is logged for each source, as a mean over supervised tokens in nats.

    Attributes:
        name: in `metrics.jsonl`.
        over: the column that counts the tokens of the mean; `tokens` counts every supervised one.
    """

    name: str
    over: str = "tokens"


class Term:
    """Settings of one term of a loss; subclasses are frozen dataclasses.

    Attributes:
        needs: what the term is computed from.
        computation: computes the term; terms that share one are computed together.
        suffices: whether a loss may consist of this term alone.
        weight: factor of the term.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid", "strict": True}
    needs: ClassVar[frozenset[Need]] = frozenset()
    computation: ClassVar[type[Computation]]
    suffices: ClassVar[bool] = True
    weight: float

    def __post_init__(self) -> None:
        check_weight(self.weight)

    @property
    def weighs(self) -> bool:
        """Whether the term adds anything to the loss."""
        return self.weight > 0.0

    @property
    def needs_live_teacher(self) -> bool:
        """Whether it compares with more than the sparse predictions that a cache keeps."""
        return False


def check_weight(weight: float) -> None:
    """Raise ValueError unless a weight is finite and not negative."""
    if not 0.0 <= weight < float("inf"):
        raise ValueError(f"weight must be finite and not negative, got {weight}")


@dataclass(frozen=True)
class Computed:
    """What a computation returns.

    Attributes:
        total: scalar, the weighted sum of its terms, to differentiate; None adds nothing.
        terms: detached weighted sum of each term that was measured, by name.
        columns: detached [N] values of the supervised tokens by column, counting columns included.
    """

    total: Tensor | None
    terms: Mapping[str, Tensor] = field(default_factory=dict)
    columns: Mapping[str, Tensor] = field(default_factory=dict)


class Computation(Protocol):
    """Computes one term, or several that share their work, for all sources at once.

    Args:
        terms: the settings by the term's name, each by source index; None where a source lacks it.

    Attributes:
        columns: what it logs for each source.
    """

    columns: ClassVar[Sequence[Column]]

    def __init__(self, terms: Mapping[str, Sequence[Any]]) -> None: ...

    def __call__(self, forward: ForwardPass) -> Computed:
        """Compute the terms on one batch."""


@dataclass(frozen=True)
class Losses:
    """Sums over the supervised positions of a batch.

    Attributes:
        total: the weighted sum of all terms, to differentiate.
        terms: detached weighted sums of each term that was measured.
        by_source: [sources, columns] detached unweighted sums, see `Objective.columns`.
        per_token: [N, columns] what these are sums of, in the order of the supervised positions.
    """

    total: Tensor
    terms: dict[str, Tensor]
    by_source: Tensor
    per_token: Tensor


class Objective:
    """The loss of a stage: for each source its own terms.

    Args:
        by_source: the terms of each source, by source index.

    Attributes:
        terms: names of the terms that any source weighs, in the order of `LossTerms`.
        needs: what those terms are computed from.
        computations: what computes them.
        logged: the columns of the sources' means.
        columns: of `Losses.by_source`: `tokens`, and each logged column after the one that counts
            its tokens.
    """

    def __init__(self, by_source: Sequence[LossTerms]) -> None:
        self.by_source = list(by_source)
        names = dict.fromkeys(name for terms in by_source for name in terms.names)
        self.terms = [n for n in names if any(terms.weighs(n) for terms in by_source)]
        self.needs: frozenset[Need] = frozenset().union(
            *(term.needs for terms in by_source for term in terms.present.values() if term.weighs)
        )
        groups: dict[type[Computation], dict[str, list[Term | None]]] = {}
        for name in names:
            settings = [terms.measured(name) for terms in by_source]
            for kind in dict.fromkeys(type(each).computation for each in settings if each):
                groups.setdefault(kind, {})[name] = settings
        self.computations = [
            kind(terms)
            for kind, terms in groups.items()
            if any(name in self.terms or name in by_source[0].always for name in terms)
        ]
        self.logged = [column for each in self.computations for column in each.columns]
        self.columns = list(
            dict.fromkeys(["tokens", *(n for c in self.logged for n in (c.over, c.name))])
        )

    def find(self, kind: type[ComputationT]) -> ComputationT | None:
        """The computation of a kind; None where no source weighs its terms."""
        return next((each for each in self.computations if isinstance(each, kind)), None)

    def __call__(self, forward: ForwardPass) -> Losses:
        """The summed loss of a batch.

        Raises:
            ValueError: a source whose loss compares predictions has no teacher in the signal.
        """
        hidden, count = forward.hidden, len(forward.positions)
        # Joined to the last hidden states even where no token is scored: gradients then reach every
        # parameter, which DDP and FSDP wait for.
        total = hidden.sum() * 0.0
        terms: dict[str, Tensor] = {}
        nothing = hidden.new_zeros(count, dtype=torch.float32)
        values = dict.fromkeys(self.columns, nothing) | {"tokens": nothing + 1.0}
        for compute in self.computations:
            computed = compute(forward)
            total = total if computed.total is None else total + computed.total
            terms |= computed.terms
            values |= computed.columns
        rows = torch.stack([values[name].float() for name in self.columns], dim=1)
        by_source = rows.new_zeros((len(self.by_source), len(self.columns)))
        by_source.index_add_(0, forward.supervised_sources, rows)
        return Losses(total, terms, by_source, rows)


def __getattr__(name: str) -> Any:
    """`COLUMNS` of the release before: the columns of an objective, which has them itself now."""
    if name != "COLUMNS":
        raise AttributeError(name)
    warnings.warn("write objective.columns", DeprecationWarning, stacklevel=2)
    vocabulary = ("next_token", "taught", "divergence", "measured", "agreement", "teacher_entropy")
    return ("tokens", *vocabulary)
