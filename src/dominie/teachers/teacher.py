"""Turns a batch into distillation targets: the protocol, local models, adapter teachers."""

from __future__ import annotations

import contextlib
from collections.abc import Collection
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import nn

from dominie.core.distributed import one_process_at_a_time
from dominie.data.batch import Batch
from dominie.losses.targets import Part, Signal
from dominie.models.adapters import Mind
from dominie.models.attention_capture import TeacherAttention
from dominie.models.head import check_head, decoder, output_head, text_config
from dominie.models.loading import load_frozen, load_tokenizer
from dominie.models.placement import is_sharded
from dominie.models.spec import Model
from dominie.models.tokenizer_compat import adopt_ids, token_map

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


class Teacher(Protocol):
    """Anything that has a word to say on a batch: a model, a router, a cache."""

    def signal(self, batch: Batch) -> Signal:
        """Targets for the supervised positions of the rows this teacher speaks about."""


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


class MindTeacher:
    """Speaks with its own adapter, or with none, and leaves the model to the student.

    Args:
        mind: the teacher within the student's model.
        attention_layers: layers whose query and key are kept for the attention loss.
    """

    def __init__(self, mind: Mind, *, attention_layers: Collection[int] = ()) -> None:
        self.mind = mind
        self._local = LocalTeacher(mind.model, attention_layers=attention_layers)

    def signal(self, batch: Batch) -> Signal:
        """What `LocalTeacher` says, in this mind."""
        with self.mind.awake():
            return self._local.signal(batch)


def load_teacher(
    spec: Model,
    *,
    tokenizer: Any,
    device: torch.device | str = "cpu",
    mesh: DeviceMesh | None = None,
) -> Any:
    """Load a teacher for a student.

    Args:
        spec: which model.
        tokenizer: the student's.
        device: that it runs on.
        mesh: of the processes that share it out where its placement says so, see `load_frozen`.

    Raises:
        InputError: it cannot be loaded, its head does what its configuration does not say, or its
            tokens cannot be mapped.
    """
    alone = mesh is None or spec.held != "sharded"
    with contextlib.nullcontext() if alone else one_process_at_a_time():  # each loads it whole
        model = load_frozen(spec, device=device, mesh=mesh)
    check_head(model, where=spec.path)
    if spec.map_tokens:
        size = text_config(model).vocab_size
        adopt_ids(model, token_map(tokenizer, load_tokenizer(spec), size=size, where=spec.path))
    return model
