"""Hears what the routers of a mixture of experts decide while it runs."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from dominie.losses.router import Routing
from dominie.models.head import decoder, text_config


class Routers:
    """The routers of a model, layer by layer.

    Only what runs within `heard` is kept: under activation checkpointing a layer runs again in the
    backward pass, which is not to count twice.

    Args:
        model: a causal language model of transformers; adapters may be wrapped around it.
    """

    def __init__(self, model: nn.Module) -> None:
        self._heard: list[Routing] | None = None
        self._per_token = getattr(text_config(model), "num_experts_per_tok", None) or 1
        # What transformers itself would record, were the model asked for its router's logits.
        recorded = getattr(decoder(model), "_can_record_outputs", None) or {}
        gate = recorded.get("router_logits")
        kind = getattr(gate, "target_class", None)
        self._place = getattr(gate, "index", 0)
        found = [m for m in decoder(model).modules() if kind is not None and isinstance(m, kind)]
        self._hooks = [module.register_forward_hook(self._hear) for module in found]

    def __bool__(self) -> bool:
        """Whether the model has any."""
        return bool(self._hooks)

    @contextlib.contextmanager
    def heard(self) -> Iterator[list[Routing]]:
        """What the routers decide within, in the order in which they run."""
        self._heard = []
        try:
            yield self._heard
        finally:
            self._heard = None

    def detach(self) -> None:
        """Leave the model alone."""
        for hook in self._hooks:
            hook.remove()

    def _hear(self, _: nn.Module, __: Any, output: Any) -> None:
        if self._heard is None:
            return
        parts = output if isinstance(output, tuple) else (output,)
        logits: Tensor = parts[self._place]
        logits = logits.reshape(-1, logits.shape[-1])
        chosen = next((part for part in parts if not part.is_floating_point()), None)
        if chosen is None:
            chosen = torch.topk(logits, self._per_token, dim=-1).indices
        self._heard.append(Routing(logits, chosen.reshape(len(logits), -1)))
