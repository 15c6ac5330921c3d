"""Frozen models that are larger than a device: their layers are shared out over the processes.

It is FSDP2 without gradients, over a mesh of its own, so that it stands beside whatever engine
trains the student. Each forward gathers a layer, runs it and lets go of it, on every process: all
of them have to run as many forwards, each on rows of its own.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from dominie.models.head import decoder
from dominie.models.offloading import place_all_but_layers

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


def sharded(model: Any, mesh: DeviceMesh) -> Any:
    """The frozen model with a share of every layer on each process of a mesh of one dimension.

    Embeddings, norm and head, which the losses reach for outside of a forward pass, are whole.
    """
    from torch.distributed.fsdp import fully_shard

    inner = decoder(model)
    device = torch.device(mesh.device_type)
    place_all_but_layers(model, device)
    shared_out = {p for layer in inner.layers for p in layer.parameters()}
    for layer in inner.layers:
        fully_shard(layer, mesh=mesh, reshard_after_forward=True)
    # As the root of its layers it fetches the next one while a layer runs.
    fully_shard(inner, mesh=mesh, ignored_params=set(inner.parameters()) - shared_out)
    return model


def is_sharded(model: Any) -> bool:
    """Whether a forward of the model needs every process."""
    from torch.distributed.fsdp import FSDPModule

    return isinstance(decoder(model), FSDPModule)
