"""A teacher that is a model in this process."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import nn

from dominie.data.batches import Batch
from dominie.losses.signal import Part, Signal
from dominie.models.capture import TeacherAttention
from dominie.models.head import decoder, output_head
from dominie.models.sharding import is_sharded


class LocalTeacher:
    """A frozen causal language model.

    Only its decoder runs; its head meets the hidden states inside the loss, tile by tile, so that
    no logits are held.

    Args:
        model: frozen, in evaluation mode.
        attention_layers: layers whose query and key are kept for the attention loss.

    Attributes:
        needs_all_ranks: whether it speaks only where every rank runs it at once.
    """

    def __init__(self, model: nn.Module, *, attention_layers: Collection[int] = ()) -> None:
        self.model = model
        self._attention = TeacherAttention(model, attention_layers) if attention_layers else None
        self.needs_all_ranks = is_sharded(model)

    @torch.no_grad()
    def signal(self, batch: Batch) -> Signal:
        """Hidden states [n, D_t] where supervised, the head, and projections where asked."""
        hidden = decoder(self.model)(**batch.model_inputs()).last_hidden_state
        captured = self._attention.take() if self._attention else {}
        rows = torch.arange(len(batch.input_ids), device=batch.input_ids.device)
        target = (hidden[batch.supervised], output_head(self.model))
        return Signal((Part(rows, target, captured),))

    @torch.no_grad()
    def accompany(self, device: torch.device) -> None:
        """Run along with other ranks, which need the share of the weights that lies on this one."""
        nothing = torch.zeros(1, 1, dtype=torch.long, device=device)
        decoder(self.model)(input_ids=nothing, use_cache=False)
        if self._attention:
            self._attention.take()
