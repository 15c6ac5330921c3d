"""From the student's forward pass and the teachers' signal to one summed loss.

The loss is a *sum* over supervised positions. Whoever steps divides once, by the supervised tokens
of the whole optimiser step, so that micro-batches, ranks, padding and packing cannot change the
objective.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dominie.losses.router_losses import Conversations
from dominie.losses.targets import Signal, Target, of_tokens
from dominie.losses.terms import LossTerms, Prediction, Router
from dominie.losses.tiles import sum_precision
from dominie.losses.vocabulary import Head, vocabulary_losses

#: Columns of `Losses.by_source`, each a sum over the supervised tokens of a source. `taught` counts
#: those that `divergence` was summed over, `measured` those of `agreement` and `teacher_entropy`.
COLUMNS = (
    "tokens",
    "next_token",
    "taught",
    "divergence",
    "measured",
    "agreement",
    "teacher_entropy",
)


@dataclass(frozen=True)
class Losses:
    """Sums over the supervised positions of a batch.

    Attributes:
        total: the weighted sum of all terms, to differentiate.
        terms: detached weighted sums of each term.
        by_source: [sources, len(COLUMNS)] detached unweighted sums.
    """

    total: Tensor
    terms: dict[str, Tensor]
    by_source: Tensor


class Objective:
    """The loss of a stage: for each source its own terms.

    Args:
        by_source: the terms of each source, by source index.
    """

    def __init__(self, by_source: Sequence[LossTerms]) -> None:
        self.by_source = list(by_source)
        self._weights = torch.tensor(
            [
                [
                    term.weight if term else 0.0
                    for term in (terms.next_token, terms.prediction, terms.attention)
                ]
                for terms in by_source
            ],
            dtype=torch.float64,
        )
        routers = [terms.router or Router(weight=0.0) for terms in by_source]
        self._router_weights = torch.tensor(
            [[router.weight, router.z_weight] for router in routers], dtype=torch.float64
        )

    @property
    def _weighed(self) -> list[str]:
        names = ("next_token", "prediction")
        return [n for n, column in zip(names, self._weights.T, strict=False) if bool(column.any())]

    def attention_weights(
        self, labels: Tensor, source_ids: Tensor, dtype: torch.dtype = torch.float32
    ) -> Tensor:
        """[B, L] weight of each row of the maps: its source's, zero where not supervised."""
        weights = self._weights.to(labels.device, dtype)[:, 2]
        return torch.where(labels >= 0, weights[source_ids.clamp(min=0)], 0.0)

    @property
    def weighs_router(self) -> bool:
        """Whether the loss of any source has a term for the student's router."""
        return bool(self._router_weights.any())

    def conversations(
        self, labels: Tensor, source_ids: Tensor, segment_ids: Tensor
    ) -> Conversations:
        """Whose tokens those of a batch are, for `router_loss`; B·L of them, row by row.

        A conversation weighs what its source says, times its supervised tokens.
        """
        real = (source_ids >= 0).flatten()
        rows = torch.arange(len(labels), device=labels.device)[:, None]
        key = (rows * (labels.shape[1] + 1) + segment_ids).flatten()
        found, number = torch.unique(key[real], return_inverse=True)
        index = torch.full_like(key, -1)
        index[real] = number
        supervised = (labels >= 0).flatten()[real]
        tokens = torch.bincount(number[supervised], minlength=len(found))
        source = torch.zeros_like(found).scatter(0, number, source_ids.flatten()[real])
        weights = self._router_weights.to(labels.device)[source] * tokens[:, None]
        return Conversations(index, weights[:, 0], weights[:, 1])

    def __call__(
        self,
        hidden: Tensor,
        head: Head,
        *,
        labels: Tensor,
        source_ids: Tensor,
        signal: Signal | None = None,
        attention: Tensor | None = None,
        router: Tensor | None = None,
        metrics: bool = True,
    ) -> Losses:
        """The summed loss of a batch.

        Args:
            hidden: [B, L, D] last hidden states of the student.
            head: the student's output projection.
            labels: [B, L] next token where supervised, negative elsewhere.
            source_ids: [B, L] index of each token's source.
            signal: what the teachers say, None where no source has one.
            attention: scalar, the attention term already weighted by `attention_weights`.
            router: scalar, the `router_loss` weighted by `conversations`.
            metrics: whether to take the teacher's entropy and the agreement too.

        Raises:
            ValueError: a source whose loss compares predictions has no teacher's word in `signal`.
        """
        position = (labels >= 0).flatten().nonzero().squeeze(1)
        source = source_ids.flatten()[position]
        batch = _Supervised(
            hidden=hidden.flatten(0, 1)[position],
            labels=labels.flatten()[position],
            source=source,
            weights=self._weights.to(hidden.device, sum_precision(hidden.dtype))[source],
        )
        # Joined to the last hidden states even where no token is scored: gradients then reach every
        # parameter, which DDP and FSDP wait for.
        total = hidden.sum() * 0.0
        terms = {name: hidden.new_zeros(()) for name in self._weighed}
        for name, term in (("attention", attention), ("router", router)):
            if term is not None:
                total = total + term
                terms[name] = term.detach()
        statistics = hidden.new_zeros((len(COLUMNS), len(position)), dtype=torch.float32)
        statistics[0] = 1.0

        for tokens, target, prediction in self._groups(batch, position // labels.shape[1], signal):
            losses = vocabulary_losses(
                batch.hidden[tokens],
                head,
                target,
                labels=batch.labels[tokens],
                label_weights=batch.weights[tokens, 0],
                divergence_weights=None if target is None else batch.weights[tokens, 1],
                temperature=prediction.temperature,
                kind=prediction.kind,
                beta=prediction.beta,
                metrics=metrics,
                check_finite=False,  # whoever steps looks once a step
            )
            total = total + losses.divergence + losses.next_token
            for name, value in (
                ("next_token", losses.next_token),
                ("prediction", losses.divergence),
            ):
                if name in terms:
                    terms[name] += value.detach()
            for row, name in enumerate(COLUMNS):
                if (measured := getattr(losses.per_token, name, None)) is not None:
                    statistics[row, tokens] = measured.float()
            if target is not None:
                statistics[COLUMNS.index("taught"), tokens] = 1.0
                statistics[COLUMNS.index("measured"), tokens] = float(metrics)

        by_source = statistics.new_zeros((len(self.by_source), len(COLUMNS)))
        by_source.index_add_(0, source, statistics.T)
        return Losses(total, terms, by_source)

    def _groups(
        self, batch: _Supervised, row: Tensor, signal: Signal | None
    ) -> list[tuple[Tensor, Target | None, Prediction]]:
        """Supervised tokens by what they are compared with: (token indices, target, options)."""
        groups: list[tuple[Tensor, Target | None, Prediction]] = []
        untaught = torch.ones_like(row, dtype=torch.bool)
        for part in signal.parts if signal else ():
            if part.target is None:
                continue
            spoken = torch.isin(row, part.rows)
            untaught &= ~spoken
            rank = spoken.cumsum(0) - 1  # of a token within the part's target
            options: dict[Prediction, list[int]] = {}
            for index, terms in enumerate(self.by_source):
                options.setdefault(_options(terms), []).append(index)
            for prediction, sources in options.items():
                same = spoken
                if len(options) > 1:
                    same = spoken & torch.isin(
                        batch.source, torch.tensor(sources, device=row.device)
                    )
                tokens = same.nonzero().squeeze(1)
                if len(tokens):
                    target = (
                        part.target if len(options) == 1 else of_tokens(part.target, rank[tokens])
                    )
                    groups.append((tokens, target, prediction))
        left = untaught.nonzero().squeeze(1)
        if len(left):
            if bool((batch.weights[left, 1] > 0).any()):
                raise ValueError(
                    "a source compares predictions and the signal has no teacher for it"
                )
            groups.append((left, None, Prediction()))
        return groups


@dataclass(frozen=True)
class _Supervised:
    """The N supervised positions of a batch: hidden [N, D], labels, source [N], weights [N, 3]."""

    hidden: Tensor
    labels: Tensor
    source: Tensor
    weights: Tensor


def _options(terms: LossTerms) -> Prediction:
    """How predictions are compared, whatever the weight."""
    found = terms.prediction
    return (
        Prediction(kind=found.kind, temperature=found.temperature, beta=found.beta)
        if found
        else Prediction()
    )
