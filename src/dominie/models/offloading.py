"""Frozen models that are larger than the device: their layers wait in main memory."""

from __future__ import annotations

from typing import Any

import torch

from dominie.models.head import decoder


def offloaded(model: Any, device: torch.device) -> Any:
    """The model with its layers in main memory, each module on the device while it runs.

    Embeddings, norm and head, which the losses reach for outside of a forward pass, are on the
    device always.
    """
    from accelerate import cpu_offload

    place_all_but_layers(model, device)
    for layer in decoder(model).layers:
        cpu_offload(layer, execution_device=device)
    return model


def place_all_but_layers(model: Any, device: torch.device) -> None:
    """Move what no layer of the decoder holds to a device."""
    waiting = {id(module) for module in decoder(model).layers.modules()}
    for module in model.modules():
        if id(module) not in waiting:
            for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
                tensor.data = tensor.data.to(device)
