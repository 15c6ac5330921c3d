"""How much of the hardware a stage uses: the products that its models need, by the clock."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from dominie.data.batches import IGNORED
from dominie.devices import gpu_of_this_machine
from dominie.models.flops import Load, Products


class Utilisation:
    """Counts what batches make the student and its teachers compute.

    The student's forward and backward pass and the forward pass of each source's teacher; nothing
    for a teacher that speaks from a cache, for what checkpointing computes again, or for comparing.

    Args:
        student: its products.
        teachers: by source index those of its teacher, None where no model runs.
        peak: operations a second of one process's device, None where that is not known.
    """

    def __init__(
        self, student: Products, teachers: Sequence[Products | None], *, peak: float | None
    ) -> None:
        self.student, self.teachers, self.peak = student, list(teachers), peak
        models = [student, *(teacher for teacher in teachers if teacher)]
        self.windows = list(dict.fromkeys(window for model in models for window in model.attended))

    def loads(self, batch: Mapping[str, Any]) -> Tensor:
        """[sources, 2 + windows] tokens, supervised tokens, and keys seen, by source."""
        real = batch["source_ids"] >= 0
        seen = batch["position_ids"][real] + 1
        columns = [torch.ones_like(seen), (batch["labels"][real] != IGNORED).long()]
        columns += [seen if w is None else seen.clamp(max=w) for w in self.windows]
        sums: Tensor = seen.new_zeros(len(self.teachers), len(columns))
        return sums.index_add_(0, batch["source_ids"][real], torch.stack(columns, dim=1))

    def flops(self, loads: Tensor) -> float:
        """Operations that these loads come to."""
        found = self.student.training(self._load(loads.sum(0)))
        for teacher, sums in zip(self.teachers, loads, strict=True):
            found += teacher.forward(self._load(sums)) if teacher else 0.0
        return found

    def _load(self, sums: Tensor) -> Load:
        tokens, supervised, *keys = sums.tolist()
        return Load(tokens, supervised, dict(zip(self.windows, keys, strict=True)))

    def told(self, flops: float, seconds: float, processes: int) -> dict[str, float]:
        """For a line of metrics: the rate of all processes, and `mfu` where the peak is known."""
        rate = flops / max(seconds, 1e-9)
        told = {"flops_per_second": float(f"{rate:.4g}")}
        if self.peak is not None:
            told["mfu"] = round(rate / (self.peak * processes), 4)
        return told


def peak_flops(precision: str) -> float | None:
    """Of this machine's GPU in the precision of a run; None where the table does not know it."""
    gpu = gpu_of_this_machine()
    return gpu.flops(precision) if gpu else None
