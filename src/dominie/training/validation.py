"""Losses by source on the validation splits, while a stage trains: the forgetting curve."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from dominie.data.batch import Batch, Row
from dominie.teachers import Teacher
from dominie.training.dataloader import Collator
from dominie.training.loss_forward import DistillationInputs
from dominie.training.metric_sums import MetricSums


class Validation:
    """Held-out rows of every source: those the stage learns from, and those it might forget.

    Args:
        rows: by source index, the held-out rows that are used; empty where a source has none.
        sources: names of the sources by index.
        shares: share of each source in the stage, 0 for one that is only watched; weights of the
            stage's loss.
        collator: makes batches.
        teacher: speaks on the taught sources.
        batch: conversations per forward pass, on average.
    """

    def __init__(
        self,
        rows: Sequence[Sequence[Row]],
        *,
        sources: Sequence[str],
        shares: Mapping[str, float],
        collator: Collator,
        teacher: Teacher | None,
        batch: int,
    ) -> None:
        self.rows, self.sources, self.shares = rows, list(sources), dict(shares)
        self.collator, self.teacher, self.batch = collator, teacher, batch

    @torch.no_grad()
    def measure(
        self, model: nn.Module, accelerator: Any
    ) -> tuple[dict[str, dict[str, float]], float | None]:
        """Means per supervised token by source, and the stage's loss: their mean weighted by share.

        Where no source that is trained on holds anything out, there is no such loss.

        Each rank takes every n-th batch; where batches do not come out even, some rank measures a
        batch that is not counted, so that all ranks run the same number of forward passes.
        """
        training = model.training
        model.eval()
        measured, weighted, weight = {}, 0.0, 0.0
        for index, name in enumerate(self.sources):
            if not len(self.rows[index]):
                continue
            meter = MetricSums(self.sources)
            for batch, counts in self._batches(index, accelerator):
                signal = self.teacher.signal(batch) if self.teacher else None
                outputs = model(lesson=DistillationInputs(batch, signal))
                meter.add(
                    *((outputs["terms"], outputs["by_source"]) if counts else _nothing(outputs))
                )
            means = meter.means(lambda tensor: accelerator.reduce(tensor, reduction="sum"))
            loss = sum(means["terms"].values())
            measured[name] = {"loss": loss, **means["sources"].get(name, {})}
            weighted += self.shares.get(name, 0.0) * loss
            weight += self.shares.get(name, 0.0)
        model.train(training)
        return measured, weighted / weight if weight else None

    def _batches(self, source: int, accelerator: Any) -> list[tuple[Batch, bool]]:
        conversations = [(source, row) for row in self.rows[source]]
        shared = self.collator.pack(conversations, -(-len(conversations) // self.batch))
        ranks, rank = accelerator.num_processes, accelerator.process_index
        rounds = -(-len(shared) // ranks)
        batches = []
        for number in (turn * ranks + rank for turn in range(rounds)):
            rows = shared[number % len(shared)]
            batch = Batch.from_dict(self.collator(rows)).to(accelerator.device)
            batches.append((batch, number < len(shared)))
        return batches


def _nothing(outputs: Mapping[str, Any]) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """The outputs of a forward pass that does not count."""
    return {name: value * 0 for name, value in outputs["terms"].items()}, outputs["by_source"] * 0
