"""Sums over supervised tokens, by source and by term; means when a line of metrics is due."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from dominie.losses.objective import COLUMNS
from dominie.losses.terms import TERMS


class Meter:
    """Accumulates what `Losses` reports, on the device, without waiting for it.

    Args:
        sources: names of the sources by index.
        terms: the terms to take in; None takes all.
    """

    def __init__(self, sources: Sequence[str], terms: Collection[str] | None = None) -> None:
        self.sources, self.terms = list(sources), terms
        self.reset()

    def reset(self) -> None:
        """Forget everything."""
        self._terms: dict[str, Tensor] = {}
        self._by_source: Tensor | None = None
        self._valued_tokens: dict[str, Tensor] = {}
        self._routing: Tensor | None = None

    def add(
        self, terms: Mapping[str, Tensor], by_source: Tensor, routing: Tensor | None = None
    ) -> None:
        """Take in one forward pass. An absent term was not measured; it does not count as zero."""
        if routing is not None:
            summed = self._routing
            self._routing = routing.clone() if summed is None else summed + routing
        tokens = by_source[:, 0].sum()
        for name, value in terms.items():
            if self.terms is not None and name not in self.terms:
                continue
            self._terms[name] = self._terms[name] + value if name in self._terms else value.clone()
            seen = self._valued_tokens.get(name)
            self._valued_tokens[name] = tokens if seen is None else seen + tokens
        summed = self._by_source
        self._by_source = by_source.clone() if summed is None else summed + by_source

    def means(self, reduce: Any = None) -> dict[str, Any]:
        """Means in nats per supervised token: `{"terms": {name: …}, "sources": {name: {…}}}`.

        Of a mixture of experts also `"router"`, layer by layer: `load`, each expert's share of the
        routing weight, and `entropy`, the mean over tokens in nats.

        Args:
            reduce: sums a tensor over ranks; None on one rank.
        """
        if self._by_source is None:
            return {"terms": {}, "sources": {}}
        reduce = reduce or (lambda tensor: tensor)
        by_source = reduce(self._by_source).double().cpu()
        terms = self._term_means(reduce)
        means = {"terms": terms, "sources": self._source_means(by_source)}
        if self._routing is None:
            return means
        sums = reduce(self._routing).double().cpu()
        per_token = sums / sums[:, :-1].sum(-1, keepdim=True).clamp(min=1)
        rounded = [[round(value, 4) for value in layer] for layer in per_token.tolist()]
        router = {"load": [r[:-1] for r in rounded], "entropy": [r[-1] for r in rounded]}
        return {**means, "router": router}

    def _term_means(self, reduce: Any) -> dict[str, float]:
        """Means of the terms in one reduction, of those that only some ranks have measured, too."""
        assert self._by_source is not None, "checked by `means`"
        measured = self._terms if self.terms is None else self.terms
        names = [name for name in TERMS if name in measured]  # in one order on all ranks
        if not names:
            return {}
        nothing = self._by_source.new_zeros((), dtype=torch.float64)
        sums = [
            torch.stack([self._terms[name].double(), self._valued_tokens[name].double()])
            if name in self._terms
            else torch.stack([nothing, nothing])
            for name in names
        ]
        reduced = zip(names, reduce(torch.stack(sums)).tolist(), strict=True)
        return {name: total / tokens for name, (total, tokens) in reduced if tokens}

    def _source_means(self, by_source: Tensor) -> dict[str, dict[str, float]]:
        means = {}
        for name, sums in zip(self.sources, by_source.tolist(), strict=True):
            row = dict(zip(COLUMNS, sums, strict=True))
            if not row["tokens"]:
                continue
            mean: dict[str, float] = {
                "tokens": int(row["tokens"]),
                "next_token": row["next_token"] / row["tokens"],
            }
            if row["taught"]:
                mean["divergence"] = row["divergence"] / row["taught"]
            if row["measured"]:
                for column in ("agreement", "teacher_entropy"):
                    mean[column] = row[column] / row["measured"]
            means[name] = mean
        return means
