"""Sums over supervised tokens, by source and by term; means when a line of metrics is due."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from dominie.losses.objective import COLUMNS


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
        terms = {}
        for name, value in self._terms.items():
            total, tokens = reduce(
                torch.stack([value.double(), self._valued_tokens[name].double()])
            ).tolist()
            terms[name] = total / max(tokens, 1.0)
        means = {"terms": terms, "sources": self._source_means(by_source)}
        if self._routing is None:
            return means
        sums = reduce(self._routing).double().cpu()
        per_token = sums / sums[:, :-1].sum(-1, keepdim=True).clamp(min=1)
        rounded = [[round(value, 4) for value in layer] for layer in per_token.tolist()]
        router = {"load": [r[:-1] for r in rounded], "entropy": [r[-1] for r in rounded]}
        return {**means, "router": router}

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
