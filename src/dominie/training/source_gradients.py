"""How hard each source pulls at the student: the norm of its part of a step's gradient."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import get_total_norm

from dominie.data.batches import IGNORED, Batch


def source_gradient_norms(
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
                    loss_of(_supervised_by(batch, source)).backward()  # type: ignore[no-untyped-call]
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        norm: Any = get_total_norm(gradients)
        norms[source] = float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)
        model.zero_grad()
    return norms


def sources_of(batches: Sequence[Batch], count: int, accelerator: Any) -> list[int]:
    """The sources, of `count`, that any rank has supervised tokens of in these batches."""
    tokens = torch.zeros(count, dtype=torch.long, device=accelerator.device)
    for batch in batches:
        present = batch.source_ids[batch.supervised]
        tokens += torch.bincount(present, minlength=count).to(tokens.device)
    total: Tensor = accelerator.reduce(tokens, reduction="sum")
    return total.nonzero().flatten().tolist()


def _supervised_by(batch: Batch, source: int) -> Batch:
    """The batch with the tokens of one source alone to learn from."""
    labels = batch.labels.masked_fill(batch.source_ids != source, IGNORED)
    return dataclasses.replace(batch, labels=labels)
