"""Counts what a stage uses: tokens, positions, FLOPs, time and memory."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import psutil
import torch
from accelerate import Accelerator

from dominie.core.hardware import gpu_of_this_machine
from dominie.data.batch import Batch
from dominie.models.info import ModelFlops, Workload

if TYPE_CHECKING:
    from numpy.typing import NDArray


def held_memory() -> int:
    """Bytes that this process holds where it computes: the most so far, on a GPU."""
    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated())
    return int(psutil.Process().memory_info().rss)


class FlopsMeter:
    """Counts what batches make the student and its teachers compute.

    The student's forward and backward pass and the forward pass of each source's teacher; nothing
    for a cached teacher, for what checkpointing computes again, or for the comparison.

    Args:
        student: what its FLOPs follow from.
        teachers: by source index those of its teacher, None where no model runs.
        peak: operations a second of one process's device, None where that is not known.
    """

    def __init__(
        self, student: ModelFlops, teachers: Sequence[ModelFlops | None], *, peak: float | None
    ) -> None:
        self.student, self.teachers, self.peak = student, list(teachers), peak
        models = [student, *(teacher for teacher in teachers if teacher)]
        self.windows = list(dict.fromkeys(window for model in models for window in model.attended))

    def loads(self, batch: Batch) -> NDArray[np.int64]:
        """[sources, 2 + windows] tokens, supervised tokens, and keys seen, by source."""
        sums = np.zeros((len(self.teachers), 2 + len(self.windows)), np.int64)
        for span in batch.spans:
            keys = [_keys_seen(span.tokens, window) for window in self.windows]
            sums[span.source] += [span.tokens, span.supervised, *keys]
        return sums

    def flops(self, loads: NDArray[np.int64]) -> float:
        """Operations that these loads come to."""
        found = self.student.training(self._load(loads.sum(0)))
        for teacher, sums in zip(self.teachers, loads, strict=True):
            found += teacher.forward(self._load(sums)) if teacher else 0.0
        return found

    def _load(self, sums: NDArray[np.int64]) -> Workload:
        tokens, supervised, *keys = sums.tolist()
        return Workload(tokens, supervised, dict(zip(self.windows, keys, strict=True)))

    def log_entry(self, flops: float, seconds: float, processes: int) -> dict[str, float]:
        """For a line of metrics: the rate of all processes, and `mfu` where the peak is known."""
        rate = flops / max(seconds, 1e-9)
        entry = {"flops_per_second": float(f"{rate:.4g}")}
        if self.peak is not None:
            entry["mfu"] = round(rate / (self.peak * processes), 4)
        return entry


def _keys_seen(tokens: int, window: int | None) -> int:
    """Keys that the tokens of a conversation see: 1, 2, 3 and so on, up to the window."""
    ramp = tokens if window is None else min(tokens, window)
    return ramp * (ramp + 1) // 2 + (tokens - ramp) * ramp


def peak_flops(precision: str) -> float | None:
    """Of this machine's GPU in the precision of a run; None where the table does not know it."""
    gpu = gpu_of_this_machine()
    return gpu.flops(precision) if gpu else None


logger = logging.getLogger(__name__)


class Counters:
    """Kept by every process alike, of what all of them spend.

    Args:
        flops_meter: counts the FLOPs of batches.

    Attributes:
        supervised_tokens: that the stage has learnt, those before an interruption included.
        steps_without_tokens: steps in which there were none.
    """

    def __init__(self, flops_meter: FlopsMeter) -> None:
        self.flops_meter = flops_meter
        self.supervised_tokens = self.steps_without_tokens = 0
        self._logged_tokens, self._logged_at = 0, 0.0
        self._earlier, self._started = 0.0, time.monotonic()
        self._begin_line()

    def _begin_line(self) -> None:
        self._real_tokens, self._positions, self._flops = 0, 0, 0.0

    @property
    def seconds(self) -> float:
        """Seconds this stage has trained, those before an interruption included."""
        return self._earlier + time.monotonic() - self._started

    def go_on(self, line: Mapping[str, Any]) -> None:
        """Restore the counts from the last line before an interruption, if there was one."""
        self.supervised_tokens = self._logged_tokens = int(line.get("tokens", 0))
        self.steps_without_tokens = int(line.get("steps_without_tokens", 0))
        self._earlier = self._logged_at = float(line.get("seconds", 0.0))
        self._started = time.monotonic()

    def add(self, batches: Sequence[Batch], accelerator: Accelerator, *, step: int) -> list[int]:
        """Count the micro-batches of a step; its supervised tokens over all ranks, by source."""
        loads = sum(self.flops_meter.loads(batch) for batch in batches)
        positions = sum(batch.labels.numel() for batch in batches)
        counts = np.concatenate([[positions], np.ravel(loads)])
        if accelerator.num_processes > 1:  # one rank need not wait for its device
            total = torch.from_numpy(counts).to(accelerator.device)
            counts = accelerator.reduce(total, reduction="sum").cpu().numpy()
        loads = counts[1:].reshape(len(self.flops_meter.teachers), -1)
        supervised: list[int] = loads[:, 1].tolist()
        self.supervised_tokens += sum(supervised)
        self._real_tokens += int(loads[:, 0].sum())
        self._positions += int(counts[0])
        self._flops += self.flops_meter.flops(loads)
        if not any(supervised):
            self.steps_without_tokens += 1
            if self.steps_without_tokens == 1:
                logger.warning(
                    "step %d has no supervised token; it adds nothing (such steps are counted in "
                    "metrics.jsonl)",
                    step,
                )
        return supervised

    def log_entry(self, processes: int) -> dict[str, Any]:
        """The counts for a line of `metrics.jsonl`; those of the next line begin here."""
        now = self.seconds
        passed = max(now - self._logged_at, 1e-9)
        entry = {
            "tokens": self.supervised_tokens,
            "tokens_per_second": (self.supervised_tokens - self._logged_tokens) / passed,
            "seconds": round(now, 3),
            "throughput": {
                "tokens_per_second": self._real_tokens / passed,
                "real_tokens": round(self._real_tokens / max(self._positions, 1), 4),
                **self.flops_meter.log_entry(self._flops, passed, processes),
                "memory_gb": round(held_memory() / 1e9, 3),
            },
        }
        if self.steps_without_tokens:
            entry["steps_without_tokens"] = self.steps_without_tokens
        self._logged_tokens, self._logged_at = self.supervised_tokens, now
        self._begin_line()
        return entry
