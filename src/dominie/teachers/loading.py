"""A model as a teacher: frozen, its head understood, speaking the student's token ids."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

import torch

from dominie.models.head import check_head, text_config
from dominie.models.loading import load_frozen, load_tokenizer
from dominie.models.spec import Model
from dominie.models.token_map import adopt_ids, token_map
from dominie.processes.ranks import in_turn

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


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
    with contextlib.nullcontext() if alone else in_turn():  # each loads it whole
        model = load_frozen(spec, device=device, mesh=mesh)
    check_head(model, where=spec.path)
    if spec.map_tokens:
        size = text_config(model).vocab_size
        adopt_ids(model, token_map(tokenizer, load_tokenizer(spec), size=size, where=spec.path))
    return model
