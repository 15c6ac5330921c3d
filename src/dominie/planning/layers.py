"""The same model with fewer layers."""

from __future__ import annotations

import copy
from typing import Any


def with_layers(config: Any, layers: int) -> Any:
    """The configuration of the same model with fewer layers."""
    cut = copy.deepcopy(config)
    whole = config.num_hidden_layers
    for key, value in vars(config).items():
        if isinstance(value, list) and len(value) == whole:
            setattr(cut, key, value[:layers])
    cut.num_hidden_layers = layers
    return cut
