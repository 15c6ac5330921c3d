"""How a model is made of others without training: the settings of such a stage."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from dominie.core.references import ModelName, SourceName


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
    models: dict[ModelName, float]
    method: Literal["linear", "task_arithmetic"] = "linear"
    base: ModelName | None = None

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


@dataclass(frozen=True, kw_only=True)
class Upcycle:
    """A dense model as a mixture of experts; docs/moe.md has the ways to tell them apart.

    With `noise` and `reset` at 0 and no siblings, experts begin as copies, and the mixture computes
    what the dense model does, whatever the gate.

    Attributes:
        model: the dense model, which gives everything but further experts.
        siblings: models fine-tuned from it, whose feed-forward layers are the experts after the
            first; where they are fewer, experts take turns.
        experts: how many there are.
        experts_per_token: how many each token is sent to.
        noise: deviation of noise added to each expert's weights, in units of each weight's own;
            the noises of all experts sum to zero, so that their mean is what it was.
        reset: share of each expert's intermediate dimension that is drawn anew with the mean and
            deviation of what it replaces (Drop-Upcycling, Nakamura et al. 2025).
        gate: `zeros`; `random` directions; or `hidden_states`, the centres that k-means finds among
            the dense model's own feed-forward inputs.
        gate_scale: deviation of the router's logits over tokens, for a gate that is not zeros.
        source: of the recipe's data, whose conversations `hidden_states` reads.
        tokens: how many of its tokens.
        seed: of noise, resets and gate.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid", "strict": True}
    model: ModelName
    siblings: list[ModelName] = field(default_factory=list)
    experts: int = 2
    experts_per_token: int = 2
    noise: float = 0.0
    reset: float = 0.0
    gate: Literal["zeros", "random", "hidden_states"] = "random"
    gate_scale: float = 1.0
    source: SourceName | None = None
    tokens: int = 4096
    seed: int = 0

    def __post_init__(self) -> None:
        if self.experts < 2:
            raise ValueError(f"a mixture needs at least 2 experts, got {self.experts}")
        if not 1 <= self.experts_per_token <= self.experts:
            raise ValueError(
                f"experts_per_token must be from 1 to {self.experts}, the experts there are, "
                f"got {self.experts_per_token}"
            )
        if len(self.siblings) >= self.experts:
            raise ValueError(
                f"{len(self.siblings)} siblings beside the model need "
                f"{len(self.siblings) + 1} experts, got {self.experts}"
            )
        if len({self.model, *self.siblings}) <= len(self.siblings):
            raise ValueError("siblings names a model twice, or the model itself")
        if not 0.0 <= self.noise < float("inf"):
            raise ValueError(f"noise must be finite and not negative, got {self.noise}")
        if not 0.0 <= self.reset <= 1.0:
            raise ValueError(f"reset must be from 0 to 1, got {self.reset}")
        if not 0.0 < self.gate_scale < float("inf"):
            raise ValueError(f"gate_scale must be positive and finite, got {self.gate_scale}")
        if (self.source is not None) != (self.gate == "hidden_states"):
            raise ValueError(
                "gate hidden_states needs a source to read"
                if self.source is None
                else f"gate {self.gate} reads no source"
            )
        if self.tokens < self.experts:
            raise ValueError(f"tokens must be at least {self.experts}, got {self.tokens}")
        if self.seed < 0:
            raise ValueError(f"seed must not be negative, got {self.seed}")

    @property
    def sources(self) -> list[str]:
        """Every model that is read; the first gives configuration and tokenizer."""
        return [self.model, *self.siblings]

    @property
    def separates(self) -> bool:
        """Whether anything tells the experts apart, so that training can."""
        return bool(self.siblings or self.noise or self.reset or self.gate != "zeros")
