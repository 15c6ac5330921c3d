"""Sums of metrics over supervised tokens, gradient norms by source, and `metrics.jsonl`."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import get_total_norm

from dominie.core.io import open_append, write_atomic
from dominie.core.run_reader import read_lines
from dominie.data.batch import Batch
from dominie.losses.objective import Objective


class MetricSums:
    """Accumulates what `Losses` reports, on the device, without waiting for it.

    Args:
        sources: names of the sources by index.
        objective: the loss of the stage, which names its terms and columns.
        terms: the terms to take in; None takes all.
    """

    def __init__(
        self, sources: Sequence[str], objective: Objective, terms: Collection[str] | None = None
    ) -> None:
        self.sources, self.objective, self.terms = list(sources), objective, terms
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
        tokens = by_source[:, 0].sum()
        for name, value in terms.items():
            if self.terms is None or name in self.terms:
                self._terms[name] = _added(self._terms.get(name), value)
                self._valued_tokens[name] = _added(self._valued_tokens.get(name), tokens)
        self._by_source = _added(self._by_source, by_source)
        if routing is not None:
            self._routing = _added(self._routing, routing)

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
        names = [n for n in self.objective.terms if n in measured]  # in one order on all ranks
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
            row = dict(zip(self.objective.columns, sums, strict=True))
            if not row["tokens"]:
                continue
            mean: dict[str, float] = {"tokens": int(row["tokens"])}
            for column in self.objective.logged:
                if row[column.over]:
                    mean[column.name] = row[column.name] / row[column.over]
            means[name] = mean
        return means


def _added(total: Tensor | None, value: Tensor) -> Tensor:
    return value.clone() if total is None else total + value


def grad_norms_by_source(
    model: nn.Module,
    batches: Sequence[Batch],
    sources: Collection[int],
    *,
    loss_of: Callable[[Batch], Tensor],
    accelerator: Any,
) -> dict[int, float]:
    """Norm of each source's part of the gradient of an optimiser step; the parts sum to the whole.

    Each part is a pass over the step's batches in which the other sources are not supervised. All
    begin from the random state that the step itself is about to begin from, so that they see its
    dropout, and leave that state as it was.

    Args:
        model: the student as it is trained, without gradients; it is left without.
        batches: the micro-batches of the step on this rank.
        sources: indices of the sources to measure, the same on every rank.
        loss_of: a batch's part of the step's loss.
        accelerator: accelerate's, which knows when ranks share gradients.

    Returns:
        Norm by source index, over all ranks.
    """
    devices = [accelerator.device] if accelerator.device.type == "cuda" else []
    norms = {}
    for source in sources:
        with torch.random.fork_rng(devices=devices):
            for number, batch in enumerate(batches, start=1):
                last = number == len(batches)
                with contextlib.nullcontext() if last else accelerator.no_sync(model):
                    loss_of(batch.supervised_by(source)).backward()  # type: ignore[no-untyped-call]
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        norm: Any = get_total_norm(gradients)
        norms[source] = float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)
        model.zero_grad()
    return norms


def sources_of(batches: Sequence[Batch], count: int, accelerator: Any) -> list[int]:
    """The sources, of `count`, that any rank has supervised tokens of in these batches."""
    tokens = [0] * count
    for batch in batches:
        for span in batch.spans:
            tokens[span.source] += span.supervised
    if accelerator.num_processes > 1:
        total = torch.tensor(tokens, device=accelerator.device)
        tokens = accelerator.reduce(total, reduction="sum").tolist()
    return [source for source in range(count) if tokens[source]]


def read_both(loss: Tensor, norm: Any) -> tuple[float, float]:
    """A loss and a gradient's norm as numbers; a device that has both is waited for once."""
    if not isinstance(norm, Tensor) or hasattr(norm, "full_tensor") or norm.device != loss.device:
        return float(loss), float(norm)
    one, other = torch.stack([loss.double(), norm.detach().double()]).tolist()
    return one, other


class MetricsLog:
    """A JSON-lines file of metrics.

    Args:
        path: the file; made when the first line comes.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def append(self, record: dict[str, Any]) -> None:
        """Add one line."""
        with open_append(self.path) as file:
            file.write(json.dumps(record).encode() + b"\n")

    def rewind(self, step: int, copy: Path | None = None) -> dict[str, Any]:
        """Drop lines after `step`, and a last line that was cut off in the writing.

        Args:
            step: the last that counts.
            copy: of the lines as they were then, which is believed rather than the file.

        Returns:
            The last training line that is left, empty without one.
        """
        source = copy if copy is not None and copy.exists() else self.path
        if not source.exists():
            return {}
        kept = [
            line
            for line in source.read_text(encoding="utf-8", errors="replace").splitlines()
            if _step(line, step + 1) <= step
        ]
        write_atomic(self.path, "".join(line + "\n" for line in kept))
        return next(
            (record for line in reversed(kept) if "terms" in (record := json.loads(line))), {}
        )

    def token_shares(self) -> dict[str, float]:
        """Each source's fraction of the supervised tokens trained on so far."""
        tokens: dict[str, int] = {}
        for record in self.read():
            for source, means in record.get("sources", {}).items():
                tokens[source] = tokens.get(source, 0) + means["tokens"]
        total = max(sum(tokens.values()), 1)
        return {source: round(count / total, 6) for source, count in tokens.items()}

    def loss_shares(self) -> dict[str, float]:
        """Each source's part of the loss, were all tokens' losses equal: the mean over the steps.

        A line before there were such shares has those of its tokens.
        """
        parts: dict[str, float] = {}
        before = 0
        for record in self.read():
            if not (sources := record.get("sources")):
                continue
            steps, before = record["step"] - before, record["step"]
            tokens = max(sum(means.get("tokens", 0) for means in sources.values()), 1)
            for source, means in sources.items():
                share = means.get("loss_share", means.get("tokens", 0) / tokens)
                parts[source] = parts.get(source, 0.0) + steps * share
        total = sum(parts.values()) or 1.0
        return {source: round(part / total, 6) for source, part in parts.items()}

    def evaluation(self, step: int | None = None) -> dict[str, Any]:
        """What was measured at a step by source, None is the last one; empty without any."""
        found = [each for each in self.read() if "evaluation" in each]
        at = [each["evaluation"] for each in found if step is None or each["step"] == step]
        return dict(at[-1]) if at else {}

    def read(self) -> list[dict[str, Any]]:
        """Every line."""
        return list(read_lines(self.path))


def _step(line: str, when_broken: int) -> int:
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return when_broken
