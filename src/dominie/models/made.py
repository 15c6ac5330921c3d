"""How a model is made of others without training: the settings of such a stage."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal


@dataclass(frozen=True, kw_only=True)
class Merge:
    """Weights of several models of one architecture, summed.

    Attributes:
        models: weight of each model, by a stage's name, a name under models, a path or hub id.
        method: `linear` is Σ wᵢ·θᵢ, the weights normalised to sum to one (model soups, Wortsman et
            al. 2022; LM-Cocktail, Xiao et al. 2023); `task_arithmetic` is θ_base + Σ wᵢ·(θᵢ −
            θ_base), the weights as they stand (Ilharco et al. 2023).
        base: what task arithmetic starts from.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid", "strict": True}
    models: dict[str, float]
    method: Literal["linear", "task_arithmetic"] = "linear"
    base: str | None = None

    def __post_init__(self) -> None:
        if not self.models:
            raise ValueError("models names nothing to merge")
        if not all(map(math.isfinite, self.models.values())):
            raise ValueError("the weights of models must be finite")
        if self.method == "linear" and sum(self.models.values()) <= 0:
            raise ValueError("the weights of a linear merge must sum to more than 0")
        if (self.base is not None) != (self.method == "task_arithmetic"):
            raise ValueError(
                "task_arithmetic needs a base to measure from"
                if self.base is None
                else "a linear merge has no base; name it among models, or use task_arithmetic"
            )

    @property
    def sources(self) -> list[str]:
        """Every model that is read; the first gives configuration and tokenizer."""
        return list(dict.fromkeys([*([self.base] if self.base else []), *self.models]))

    def coefficients(self) -> dict[str, float]:
        """What each model of `sources` is multiplied by in the sum."""
        if self.base is None:
            whole = sum(self.models.values())
            return {name: weight / whole for name, weight in self.models.items()}
        added = dict.fromkeys(self.sources, 0.0) | self.models
        added[self.base] += 1.0 - sum(self.models.values())
        return added
