"""Validation: losses on held-out rows, and how far the student has moved from its base."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn

from dominie.data.batch import Batch
from dominie.losses.arguments import product_precision
from dominie.losses.heads import Head
from dominie.losses.objective import Objective
from dominie.losses.targets import DenseTarget
from dominie.models.head import causal_lm, output_head
from dominie.teachers import LocalTeacher, Teacher
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
        forgetting: whether to measure how far the student has moved from what it began as.

    Attributes:
        base: what it predicted then; None until `begin`, and without `forgetting`.
    """

    def __init__(
        self,
        sources: Sequence[StageSource],
        objective: Objective,
        *,
        collator: Collator,
        teacher: Teacher | None,
        batch: int,
        forgetting: bool = False,
    ) -> None:
        self.sources, self.objective = list(sources), objective
        self.collator, self.teacher, self.batch = collator, teacher, batch
        self.forgetting = forgetting
        self.base: BasePredictions | None = None

    def begin(self, model: nn.Module, accelerator: Any) -> None:
        """Keep what the student predicts now, if forgetting is to be measured.

        Args:
            model: the student as its stage begins, also if it is about to go on from a checkpoint.
            accelerator: of the trainer.
        """
        if self.forgetting and self:
            numbers = range(len(self.sources))
            batches = (batch for n in numbers for batch, _ in self._batches(n, accelerator))
            self.base = BasePredictions(model, batches, accelerator)

    def __bool__(self) -> bool:
        return any(len(source.validation) for source in self.sources)

    @torch.no_grad()
    def measure(
        self, model: nn.Module, accelerator: Any
    ) -> tuple[dict[str, dict[str, float]], float | None]:
        """Means per supervised token by source, and the stage's loss: their mean weighted by share.

        Of a base that is kept also `forgetting`, KL(base ‖ student) over the whole vocabulary.

        If no source that is trained on holds anything out, there is no such loss. What is drawn
        (rows and layers of the attention term) is the same each time, and training draws as if
        nothing had been measured.

        Each rank takes every n-th batch; if their number is not a multiple of the ranks, some rank
        measures a batch that is not counted, so that all run the same number of forward passes.
        """
        devices = [accelerator.device] if accelerator.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):
            torch.default_generator.manual_seed(0)
            if devices:
                torch.cuda.manual_seed(0)
            return self._measure(model, accelerator)

    def _measure(
        self, model: nn.Module, accelerator: Any
    ) -> tuple[dict[str, dict[str, float]], float | None]:
        training = model.training
        model.eval()
        measured, weighted, weight, number = {}, 0.0, 0.0, 0
        head = self.base and self.base.head(accelerator.device)
        for index, source in enumerate(self.sources):
            if not len(source.validation):
                continue
            metrics = MetricSums([each.name for each in self.sources], self.objective)
            moved = torch.zeros((), device=accelerator.device)
            for batch, counts in self._batches(index, accelerator):
                signal = self.teacher.signal(batch) if self.teacher else None
                base = self.base.target(number, head) if self.base and head else None
                number += 1
                outputs = model(inputs=DistillationInputs(batch, signal, base=base))
                if base is not None:
                    moved += outputs["forgetting"] * counts
                terms = {name: value * counts for name, value in outputs["terms"].items()}
                metrics.add(terms, outputs["by_source"] * counts)
            means = metrics.means(lambda tensor: accelerator.reduce(tensor, reduction="sum"))
            loss = sum(means["terms"].values())
            found = means["sources"].get(source.name, {})
            measured[source.name] = {"loss": loss, **found}
            if self.base and found:
                total = float(accelerator.reduce(moved, reduction="sum"))
                measured[source.name]["forgetting"] = total / found["tokens"]
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


class BasePredictions:
    """Hidden states and the head of a student as its stage begins: its base.

    No second model is loaded, and the base runs once. The states of the supervised positions lie in
    the host's memory, in the precision of the student's products, which loses nothing: positions
    times width times 2 or 4 bytes. So does the head, unless the stage leaves it as it is.

    Args:
        model: the student, whole, on its device, before it is trained or goes on from a checkpoint.
        batches: the held-out rows in the order in which they are measured.
        accelerator: accelerate's, which knows the precision of the forward pass.
    """

    def __init__(self, model: nn.Module, batches: Iterable[Batch], accelerator: Any) -> None:
        base, training = LocalTeacher(model), model.training
        model.eval()
        self._hidden = []
        with torch.no_grad(), accelerator.autocast():
            self._head = _kept_head(model, accelerator.device)
            for batch in batches:
                states = base.predictions(batch).hidden.to(self._head.weight.dtype)
                self._hidden.append(states.to("cpu", copy=True))
        model.train(training)

    @property
    def bytes(self) -> int:
        """Of the host's memory, without the head's."""
        return sum(hidden.nbytes for hidden in self._hidden)

    def head(self, device: torch.device) -> Head:
        """The base's head on a device, for as long as it is wanted."""
        head = self._head
        bias = None if head.bias is None else head.bias.to(device)
        return dataclasses.replace(head, weight=head.weight.to(device), bias=bias)

    def target(self, number: int, head: Head) -> DenseTarget:
        """The base's predictions on a batch, by its number in the order of the batches."""
        return DenseTarget(self._hidden[number].to(head.weight.device), head)


def _kept_head(model: nn.Module, device: torch.device) -> Head:
    """The head in the precision of products: itself if nothing changes it, else a copy."""
    head = output_head(model)
    kept = head.constant(product_precision(torch.empty(0, device=device), head))
    trained = any(p.requires_grad for p in causal_lm(model).get_output_embeddings().parameters())
    if not trained and kept.weight.data_ptr() == head.weight.data_ptr():
        return kept
    bias = None if kept.bias is None else kept.bias.to("cpu", copy=True)
    return dataclasses.replace(kept, weight=kept.weight.to("cpu", copy=True), bias=bias)
