"""What a stage has spent: tokens, positions, products and time, in all and since it last told."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from dominie.training.memory import held_memory
from dominie.training.utilisation import Utilisation

logger = logging.getLogger(__name__)


class Account:
    """Kept by every process alike, of what all of them spend.

    Args:
        utilisation: counts the products of batches.

    Attributes:
        supervised_tokens: that the stage has learnt, those before an interruption included.
        steps_without_tokens: steps in which there were none.
    """

    def __init__(self, utilisation: Utilisation) -> None:
        self.utilisation = utilisation
        self.supervised_tokens = self.steps_without_tokens = 0
        self._told_tokens, self._told_at = 0, 0.0
        self._earlier, self._started = 0.0, time.monotonic()
        self._begin_line()

    def _begin_line(self) -> None:
        self._real_tokens, self._positions, self._flops = 0, 0, 0.0

    @property
    def seconds(self) -> float:
        """Seconds this stage has trained, those before an interruption included."""
        return self._earlier + time.monotonic() - self._started

    def go_on(self, line: Mapping[str, Any]) -> None:
        """Take up what the last line before an interruption told, if there was one."""
        self.supervised_tokens = self._told_tokens = int(line.get("tokens", 0))
        self.steps_without_tokens = int(line.get("steps_without_tokens", 0))
        self._earlier = self._told_at = float(line.get("seconds", 0.0))
        self._started = time.monotonic()

    def add(
        self, batches: Sequence[Mapping[str, Any]], accelerator: Accelerator, *, step: int
    ) -> Tensor:
        """Count the micro-batches of a step; its supervised tokens over all ranks, a scalar."""
        loads = torch.stack([self.utilisation.loads(batch) for batch in batches]).sum(0)
        positions = loads.new_tensor([sum(batch["labels"].numel() for batch in batches)])
        counts = torch.cat([positions, loads.flatten()]).to(accelerator.device)
        counts = accelerator.reduce(counts, reduction="sum")
        loads = counts[1:].view_as(loads)
        supervised: Tensor = loads[:, 1].sum()
        self.supervised_tokens += int(supervised)
        self._real_tokens += int(loads[:, 0].sum())
        self._positions += int(counts[0])
        self._flops += self.utilisation.flops(loads)
        if not supervised:
            self._count_empty(step)
        return supervised

    def _count_empty(self, step: int) -> None:
        self.steps_without_tokens += 1
        if self.steps_without_tokens == 1:
            logger.warning(
                "step %d has no supervised token; it adds nothing (such steps are counted in "
                "metrics.jsonl)",
                step,
            )

    def line(self, processes: int) -> dict[str, Any]:
        """What a line of `metrics.jsonl` says of it; the next one begins here."""
        now = self.seconds
        passed = max(now - self._told_at, 1e-9)
        told = {
            "tokens": self.supervised_tokens,
            "tokens_per_second": (self.supervised_tokens - self._told_tokens) / passed,
            "seconds": round(now, 3),
            "throughput": {
                "tokens_per_second": self._real_tokens / passed,
                "real_tokens": round(self._real_tokens / max(self._positions, 1), 4),
                **self.utilisation.told(self._flops, passed, processes),
                "memory_gb": round(held_memory() / 1e9, 3),
            },
        }
        if self.steps_without_tokens:
            told["steps_without_tokens"] = self.steps_without_tokens
        self._told_tokens, self._told_at = self.supervised_tokens, now
        self._begin_line()
        return told
