"""Which code scores a tile."""

from __future__ import annotations

import os
from importlib.util import find_spec
from typing import TYPE_CHECKING

import torch

from dominie.losses import scoring

if TYPE_CHECKING:
    from dominie.losses.tiles import Scorer

BACKENDS = ("auto", "torch", "triton")


def scorer(backend: str, device: torch.device, precision: torch.dtype, *, sparse: bool) -> Scorer:
    """The scorer of a backend.

    A sparse target is scored in torch by every backend: K stored tokens leave no tile to fuse.

    Args:
        backend: "torch", "triton", or "auto", Triton on a GPU and torch elsewhere.
        device: where the logits are. Triton runs on a CPU under ``TRITON_INTERPRET=1`` alone.
        precision: of the logits.
        sparse: whether the target is.

    Raises:
        ValueError: the backend is unknown, or cannot run here.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend is one of {', '.join(BACKENDS)}, found {backend!r}")
    obstacle = _obstacle_to_triton(device, precision)
    if backend == "triton" and obstacle is not None:
        raise ValueError(f"backend triton cannot run here: {obstacle}")
    if backend == "torch" or sparse or (backend == "auto" and (obstacle or device.type == "cpu")):
        return scoring.score
    from dominie.losses.kernels import vocabulary

    return vocabulary.score


def _obstacle_to_triton(device: torch.device, precision: torch.dtype) -> str | None:
    if find_spec("triton") is None:
        return "triton is not installed (pip install 'dominie[triton]')"
    if device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        return f"the tensors are on {device}, it needs a GPU (or TRITON_INTERPRET=1)"
    if precision != torch.float32:
        return f"its logits are float32, not {precision}"
    return None
