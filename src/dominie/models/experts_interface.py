"""Experts under autocast: their products in the precision of the run.

transformers multiplies the experts of a layer at once (`grouped_mm`), by an operator that autocast
does not know: a mixture whose trained weights are fp32 would run its experts, most of what there is
to do, in fp32, many times slower than the rest on a GPU. A second name is registered here, which
rounds the experts' weights first, as autocast does those of any linear layer.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, ExpertsInterface

if TYPE_CHECKING:
    from torch import Tensor, nn

_STOCK, _NAME = "grouped_mm", "dominie_grouped_mm"


class _Rounded:
    """A module as it is, but for its fp32 weights."""

    def __init__(self, module: nn.Module, dtype: torch.dtype) -> None:
        self._module = module
        self._rounded = {
            name: weight.to(dtype)
            for name, weight in module.named_parameters(recurse=False)
            if weight.dtype == torch.float32
        }

    def __getattr__(self, name: str) -> Any:
        rounded = self._rounded
        return rounded[name] if name in rounded else getattr(self._module, name)


def _experts(module: nn.Module, hidden: Tensor, *arguments: Tensor) -> Tensor:
    device = hidden.device.type
    seen: Any = module
    if torch.is_autocast_enabled(device):
        seen = _Rounded(module, torch.get_autocast_dtype(device))
    output: Tensor = ALL_EXPERTS_FUNCTIONS[_STOCK](seen, hidden, *arguments)
    return output


ExpertsInterface.register(_NAME, _experts)


def follow_autocast(model: Any) -> None:
    """Have a mixture's experts follow autocast; a model without any is left as it is."""
    if getattr(model.config, "_experts_implementation", None) == _STOCK and any(
        ".experts" in name for name, _ in model.named_modules()
    ):
        model.set_experts_implementation(_NAME)
