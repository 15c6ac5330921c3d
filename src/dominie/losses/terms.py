"""Chooses the terms of a loss: the recipe's `loss`, one field for each term there is.

`L = next_token.weight·CE + prediction.weight·T²·D(teacher, student) + attention.weight·KL(maps)`,
each summed over the supervised tokens. The paper's `(1−λ)·CE + λ·(L_pred + L_attn)` is these
weights set to 1−λ, λ and λ. A mixture of experts may have a term for its router beside them. The
terms over the vocabulary, next token and prediction, are computed here in one pass.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from dominie.losses.attention import Attention
from dominie.losses.divergence import Kind, LabelKind
from dominie.losses.forward_pass import BySource, ForwardPass, joined_ranges
from dominie.losses.objective import Column, Computed, Need, Term
from dominie.losses.router_losses import Router
from dominie.losses.spans import SpanTarget, span_losses
from dominie.losses.targets import Target
from dominie.losses.vocabulary import vocabulary_losses

__all__ = ["Attention", "LossTerms", "NextToken", "Prediction", "Router", "Spans"]


class VocabularyPass:
    """Next-token loss and divergence of all sources in one pass over the student's logits.

    The teachers' targets are taken part by part; where sources compare in different ways, a part is
    cut up by source. What no teacher covers has a next-token loss alone.
    """

    columns: ClassVar[Sequence[Column]] = (
        Column("next_token"),
        Column("divergence", over="taught"),
        Column("agreement", over="measured"),
        Column("teacher_entropy", over="measured"),
    )

    def __init__(
        self, terms: Mapping[str, Sequence[NextToken | Prediction | Spans | None]]
    ) -> None:
        nothing = [None] * len(terms["next_token"])
        self._weights = {
            name: BySource(each.weight if each else 0.0 for each in terms.get(name, nothing))
            for name in ("next_token", "prediction", "spans")
        }
        labels = [
            each if isinstance(each, NextToken) else _UNLABELLED for each in terms["next_token"]
        ]
        # Where labels weigh nothing they have no gradient, and any kind will do.
        kind = next((each.kind for each in labels if each.weighs), _UNLABELLED.kind)
        self._scorings = [
            # Spans put weights of their own on the labels, whose kind is plain.
            (each.kind if each.weighs or spans else kind, _options(spans or compared))
            for each, compared, spans in zip(
                labels, *(terms.get(name, nothing) for name in ("prediction", "spans")), strict=True
            )
        ]

    def __call__(self, forward: ForwardPass) -> Computed:
        """Both sums, and the values of every supervised token."""
        hidden, labels = forward.supervised_hidden, forward.supervised_labels
        weights = {name: forward.coefficients(each) for name, each in self._weights.items()}
        total: Tensor | None = None
        terms = {name: hidden.new_zeros(()) for name, by in self._weights.items() if by}
        logged = {
            name: hidden.new_zeros(len(labels), dtype=torch.float32)
            for column in self.columns
            for name in (column.over, column.name)
            if name != "tokens"
        }
        for tokens, target, (label_kind, options) in self._groups(forward):
            term = "spans" if isinstance(target, SpanTarget) else "prediction"
            shared: dict[str, Any] = {
                "labels": labels[tokens],
                "label_weights": weights["next_token"][tokens],
                "divergence_weights": None if target is None else weights[term][tokens],
                "metrics": forward.metrics,
                "check_finite": False,  # whoever steps looks once a step
            }
            if isinstance(target, SpanTarget):
                assert isinstance(options, Spans), "only sources with this term have such targets"
                temperature = options.chunk_temperature
                losses = span_losses(
                    hidden[tokens], forward.head, target, chunk_temperature=temperature, **shared
                )
            else:
                compared = options if isinstance(options, Prediction) else Prediction()
                losses = vocabulary_losses(
                    hidden[tokens],
                    forward.head,
                    target,
                    temperature=compared.temperature,
                    kind=compared.kind,
                    beta=compared.beta,
                    label_kind=label_kind,
                    **shared,
                )
            both = losses.divergence + losses.next_token
            total = both if total is None else total + both
            sums = {"next_token": losses.next_token, term: losses.divergence}
            terms = {
                name: value + sums[name].detach() if name in sums else value
                for name, value in terms.items()
            }
            for name, values in logged.items():
                if (measured := getattr(losses.per_token, name, None)) is not None:
                    values[tokens] = measured.float()
            if target is not None:
                spans = target if isinstance(target, SpanTarget) else None
                logged["taught"][tokens] = 1.0 if spans is None else spans.compared.float()
                measured = 1.0 if spans is None else spans.weights.float()
                logged["measured"][tokens] = measured * float(forward.metrics)
        return Computed(total, terms, logged)

    def _groups(
        self, forward: ForwardPass
    ) -> Iterator[tuple[Tensor | slice, Target | SpanTarget | None, _Scoring]]:
        """Supervised tokens by how they are scored: (tokens, target, kind and options)."""
        everything = forward.signal.parts if forward.signal else ()
        targets = [(part.rows, part.target) for part in everything if part.target is not None]
        if not len(forward.positions):
            return
        whole = len(targets) == 1 and len(targets[0][0]) == len(forward.labels)
        scorings = list(dict.fromkeys(self._scorings))
        if whole and len(scorings) == 1:
            yield slice(None), targets[0][1], scorings[0]
            return
        # Of each group its tokens, and where they stand among those of their teacher.
        groups: dict[tuple[int, _Scoring], tuple[list[_Range], list[_Range]]]
        groups = {(part, each): ([], []) for part in range(len(targets)) for each in scorings}
        untaught: dict[LabelKind, list[_Range]] = {kind: [] for kind, _ in scorings}
        part_of = {row: part for part, (rows, _) in enumerate(targets) for row in rows.tolist()}
        taught, start = [0] * len(targets), 0
        for span in forward.conversations:
            stop, scoring = start + span.supervised, self._scorings[span.source]
            if (part := part_of.get(span.row)) is not None:
                tokens, ranks = groups[part, scoring]
                tokens.append((start, stop))
                ranks.append((taught[part], taught[part] + span.supervised))
                taught[part] += span.supervised
            elif start < stop:
                if any(self._weights[each].values[span.source] > 0 for each in _COMPARED):
                    raise ValueError(
                        "a source compares predictions and the signal has no teacher for it"
                    )
                untaught[scoring[0]].append((start, stop))
            start = stop
        device = forward.labels.device
        for (part, scoring), (tokens, ranks) in groups.items():
            if any(first < last for first, last in tokens):
                target = targets[part][1]
                if len(scorings) > 1:
                    target = target[joined_ranges(ranks, device)]
                yield joined_ranges(tokens, device), target, scoring
        for kind, left in untaught.items():
            if left:
                everything_left = not targets and len(untaught) == 1
                tokens_left = slice(None) if everything_left else joined_ranges(left, device)
                yield tokens_left, None, (kind, Prediction())


#: How tokens are scored: against their labels, and against a teacher.
_Scoring = tuple[LabelKind, "Prediction | Spans"]
#: The terms that compare with a teacher's distribution.
_COMPARED = ("prediction", "spans")
#: From the first to behind the last.
_Range = tuple[int, int]


@dataclass(frozen=True, kw_only=True)
class NextToken(Term):
    """Cross entropy against the labels.

    What is logged as `next_token` is the plain cross entropy for every kind.

    Attributes:
        weight: factor of the term.
        kind: "cross_entropy"; "dft" multiplies that of a token by the student's probability of the
            label (arXiv 2508.05629), "eaft" by the entropy of its 20 likeliest tokens over 3 nats
            (2601.02151), both as constants.
    """

    needs: ClassVar[frozenset[Need]] = frozenset({"labels"})
    computation = VocabularyPass
    weight: float = 1.0
    kind: LabelKind = "cross_entropy"


@dataclass(frozen=True, kw_only=True)
class Prediction(Term):
    """Divergence between the next-token distributions of teacher and student.

    Attributes:
        weight: factor of the term.
        kind: which divergence; see `dominie.losses.vocabulary_losses`.
        temperature: T of both softmaxes; value and gradient carry T².
        beta: mix of `jsd` and skew of `skewed_kl`; unused by the others.
    """

    needs: ClassVar[frozenset[Need]] = frozenset({"distribution"})
    computation = VocabularyPass
    weight: float = 1.0
    kind: Kind = "forward_kl"
    temperature: float = 1.0
    beta: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0.0 < self.temperature < float("inf"):
            raise ValueError(f"temperature must be positive and finite, got {self.temperature}")
        if not 0.0 < self.beta < 1.0:
            raise ValueError(f"beta must lie strictly between 0 and 1, got {self.beta}")

    @property
    def needs_live_teacher(self) -> bool:
        """Whether the divergence is one that a sparse target does not define."""
        return self.kind != "forward_kl"


@dataclass(frozen=True, kw_only=True)
class Spans(Term):
    """Likelihoods of aligned spans of text: for a teacher with another tokenizer.

    Where tokens of both models end at the same byte of an answer, the teacher's distribution is
    mapped into the student's vocabulary and compared by forward KL (`docs/other-tokenizers.md`).
    Where a token of one side is several of the other, likelihoods of what is written are.

    Attributes:
        weight: factor of the term.
        chunk_temperature: τ of the likelihoods p^{1/τ} of chunks that are several tokens of the
            student (arXiv 2503.20083).
    """

    needs: ClassVar[frozenset[Need]] = frozenset({"distribution"})
    computation = VocabularyPass
    weight: float = 1.0
    chunk_temperature: float = 5.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0.0 < self.chunk_temperature < float("inf"):
            raise ValueError(
                f"chunk_temperature must be positive and finite, got {self.chunk_temperature}"
            )

    @property
    def needs_live_teacher(self) -> bool:
        """Whether the term weighs: no cache keeps what chunks are compared with."""
        return self.weighs


_UNLABELLED = NextToken(weight=0.0)


def _options(term: NextToken | Prediction | Spans | None) -> Prediction | Spans:
    """How predictions are compared, whatever the weight."""
    return replace(term, weight=1.0) if isinstance(term, Prediction | Spans) else Prediction()


@dataclass(frozen=True, kw_only=True)
class LossTerms:
    """The terms of one source's loss; a term that is None or weighs 0 is not computed.

    Attributes:
        next_token: the labels of the data, the only term that needs no teacher.
        prediction: the teacher's next-token distributions.
        spans: the same of a teacher with another tokenizer, in place of `prediction`.
        attention: the teacher's attention.
        router: load balancing, where the student is a mixture of experts.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid", "strict": True}
    #: Terms that are measured for every source, whether they weigh anything or not.
    always: ClassVar[dict[str, Term]] = {"next_token": _UNLABELLED}
    next_token: NextToken | None = None
    prediction: Prediction | None = None
    spans: Spans | None = None
    attention: Attention | None = None
    router: Router | None = None

    def __post_init__(self) -> None:
        if not any(term.suffices and term.weighs for term in self.present.values()):
            beside = " beside router" if self.router else ""
            raise ValueError(f"a loss needs at least one term{beside} with a weight above 0")
        if not self.weighs("spans"):
            return
        if other := next((n for n in ("prediction", "attention") if self.weighs(n)), None):
            raise ValueError(
                f"spans and {other} are for different teachers: spans compares with one of another "
                f"tokenizer, {other} with one of the student's; leave one of them out"
            )
        if self.next_token is not None and self.next_token.kind != "cross_entropy":
            raise ValueError("beside spans, next_token is kind: cross_entropy")

    @property
    def names(self) -> list[str]:
        """Names of all terms there are, in order."""
        return [each.name for each in fields(self)]

    @property
    def present(self) -> dict[str, Term]:
        """The terms that are given, by name."""
        found = {name: getattr(self, name) for name in self.names}
        return {name: term for name, term in found.items() if term is not None}

    def measured(self, name: str) -> Term | None:
        """A term as it is computed: as given, else as it is measured for every source."""
        return self.present.get(name) or self.always.get(name)

    def weighs(self, name: str) -> bool:
        """Whether a term is given and adds anything to the loss."""
        return name in self.present and self.present[name].weighs

    @property
    def needs_teacher(self) -> bool:
        """Whether any term that weighs compares with a teacher."""
        weighed = (term for term in self.present.values() if term.weighs)
        return any(term.needs & {"distribution", "attention"} for term in weighed)

    @property
    def needs_live_teacher(self) -> bool:
        """Whether a term compares with more than the sparse predictions that a cache keeps."""
        return any(term.needs_live_teacher for term in self.present.values())
