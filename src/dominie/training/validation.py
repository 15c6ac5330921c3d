"""Losses by source on the validation splits, while a stage trains: the forgetting curve."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from dominie.data.batch import Batch
from dominie.losses.objective import Objective
from dominie.teachers import Teacher
from dominie.training.dataloader import Collator
from dominie.training.loss_forward import DistillationInputs
from dominie.training.metric_sums import MetricSums
from dominie.training.stage_sources import StageSource


class Validation:
    """Held-out rows of every source: those the stage learns from, and those it might forget.

    Args:
        sources: of the stage; their validation rows are used, their shares weigh its loss.
        objective: the loss that the student's forward pass returns.
        collator: lays rows out in batches.
        teacher: provides targets for the taught sources.
        batch: conversations per forward pass, on average.
    """

    def __init__(
        self,
        sources: Sequence[StageSource],
        objective: Objective,
        *,
        collator: Collator,
        teacher: Teacher | None,
        batch: int,
    ) -> None:
        self.sources, self.objective = list(sources), objective
        self.collator, self.teacher, self.batch = collator, teacher, batch

    def __bool__(self) -> bool:
        return any(len(source.validation) for source in self.sources)

    @torch.no_grad()
    def measure(
        self, model: nn.Module, accelerator: Any
    ) -> tuple[dict[str, dict[str, float]], float | None]:
        """Means per supervised token by source, and the stage's loss: their mean weighted by share.

        If no source that is trained on holds anything out, there is no such loss.

        Each rank takes every n-th batch; if their number is not a multiple of the ranks, some rank
        measures a batch that is not counted, so that all run the same number of forward passes.
        """
        training = model.training
        model.eval()
        measured, weighted, weight = {}, 0.0, 0.0
        for index, source in enumerate(self.sources):
            if not len(source.validation):
                continue
            metrics = MetricSums([each.name for each in self.sources], self.objective)
            for batch, counts in self._batches(index, accelerator):
                signal = self.teacher.signal(batch) if self.teacher else None
                outputs = model(inputs=DistillationInputs(batch, signal))
                metrics.add(
                    *((outputs["terms"], outputs["by_source"]) if counts else _zeros(outputs))
                )
            means = metrics.means(lambda tensor: accelerator.reduce(tensor, reduction="sum"))
            loss = sum(means["terms"].values())
            measured[source.name] = {"loss": loss, **means["sources"].get(source.name, {})}
            weighted += source.share * loss
            weight += source.share
        model.train(training)
        return measured, weighted / weight if weight else None

    def _batches(self, source: int, accelerator: Any) -> list[tuple[Batch, bool]]:
        conversations = [(source, row) for row in self.sources[source].validation]
        packed = self.collator.pack(conversations, -(-len(conversations) // self.batch))
        ranks, rank = accelerator.num_processes, accelerator.process_index
        rounds = -(-len(packed) // ranks)
        batches = []
        for number in (turn * ranks + rank for turn in range(rounds)):
            batch = self.collator(packed[number % len(packed)]).to(accelerator.device)
            batches.append((batch, number < len(packed)))
        return batches


def _zeros(outputs: Mapping[str, Any]) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """The outputs of a forward pass that does not count."""
    return {name: value * 0 for name, value in outputs["terms"].items()}, outputs["by_source"] * 0
