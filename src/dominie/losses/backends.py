"""Which code scores a tile."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dominie.losses import scoring

if TYPE_CHECKING:
    import torch

    from dominie.losses.tiles import Scorer

BACKENDS = ("auto", "torch", "triton")


def scorer(backend: str, device: torch.device) -> Scorer:  # noqa: ARG001
    """The scorer of a backend on a device, or a ValueError that says why it has none."""
    if backend not in BACKENDS:
        raise ValueError(f"backend is one of {', '.join(BACKENDS)}, found {backend!r}")
    if backend == "triton":
        raise ValueError("backend triton is not there yet")
    return scoring.score
