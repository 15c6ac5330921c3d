"""Adapters merged into the weights they lie over, wherever these are."""

from __future__ import annotations

import contextlib
import importlib
from typing import Any

from torch import Tensor
from torch.distributed.tensor import DTensor


def merged(model: Any) -> tuple[Any, dict[str, Tensor]]:
    """The model without its adapters, their products added to its weights, and the weights, whole.

    Every process has to call this: weights that an engine has cut up are gathered from all.

    Args:
        model: under peft adapters, out of the engine's wrapper.
    """
    cut = [parameter for parameter in model.parameters() if hasattr(parameter, "ds_id")]
    with _whole(cut):
        plain = model.merge_and_unload()
        state = plain.state_dict()
        state = {name: _gathered(tensor, copied=bool(cut)) for name, tensor in state.items()}
    return plain, state


def _whole(cut: list[Any]) -> contextlib.AbstractContextManager[object]:
    """Within, parameters that DeepSpeed has cut up are whole."""
    if not cut:
        return contextlib.nullcontext()
    zero = importlib.import_module("deepspeed").zero
    found: contextlib.AbstractContextManager[object] = zero.GatheredParameters(cut)
    return found


def _gathered(tensor: Tensor, *, copied: bool) -> Tensor:
    if isinstance(tensor, DTensor):
        return tensor.full_tensor().cpu()
    return tensor.clone() if copied else tensor
