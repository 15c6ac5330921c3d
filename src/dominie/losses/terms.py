"""What a stage's loss is made of: a few terms, each with a weight and its own options.

`L = next_token.weight·CE + prediction.weight·T²·D(teacher, student) + attention.weight·KL(maps)`,
each summed over the supervised tokens. The paper's `(1−λ)·CE + λ·(L_pred + L_attn)` is these
weights set to 1−λ, λ and λ. A mixture of experts may have a term for its router beside them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

Term = Literal["next_token", "prediction", "attention", "router"]
TERMS: tuple[Term, ...] = get_args(Term)
DivergenceKind = Literal["forward_kl", "reverse_kl", "jsd", "skewed_kl"]
AttentionBackend = Literal["auto", "eager", "tiles", "sdpa", "triton"]


def _check_weight(weight: float) -> None:
    if not 0.0 <= weight < float("inf"):
        raise ValueError(f"weight must be finite and not negative, got {weight}")


@dataclass(frozen=True, kw_only=True)
class NextToken:
    """Cross entropy against the labels.

    Attributes:
        weight: factor of the term.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid", "strict": True}
    weight: float = 1.0

    def __post_init__(self) -> None:
        _check_weight(self.weight)


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """Divergence between the next-token distributions of teacher and student.

    Attributes:
        weight: factor of the term.
        kind: which divergence; see `dominie.losses.vocabulary_losses`.
        temperature: T of both softmaxes; value and gradient carry T².
        beta: mix of `jsd` and skew of `skewed_kl`; unused by the others.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid", "strict": True}
    weight: float = 1.0
    kind: DivergenceKind = "forward_kl"
    temperature: float = 1.0
    beta: float = 0.5

    def __post_init__(self) -> None:
        _check_weight(self.weight)
        if not 0.0 < self.temperature < float("inf"):
            raise ValueError(f"temperature must be positive and finite, got {self.temperature}")
        if not 0.0 < self.beta < 1.0:
            raise ValueError(f"beta must lie strictly between 0 and 1, got {self.beta}")


@dataclass(frozen=True, kw_only=True)
class Attention:
    """KL between the attention maps of teacher and student, the mean over heads and mapped layers.

    Attributes:
        weight: factor of the term.
        layers: which layers are compared; see `dominie.models.layer_mapping.map_layers`.
        backend: how it is computed; see `dominie.losses.attention_divergence`.
        row_fraction: share of the supervised rows compared at each step, drawn at random; the
            expected loss is that of all.
        layer_fraction: share of the layer pairs, likewise.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid", "strict": True}
    weight: float = 1.0
    layers: str | dict[str, int] | list[list[int]] = "all"
    backend: AttentionBackend = "auto"
    row_fraction: float = 1.0
    layer_fraction: float = 1.0

    def __post_init__(self) -> None:
        _check_weight(self.weight)
        for name in ("row_fraction", "layer_fraction"):
            if not 0.0 < getattr(self, name) <= 1.0:
                raise ValueError(f"{name} must be above 0 and at most 1, got {getattr(self, name)}")


@dataclass(frozen=True, kw_only=True)
class Router:
    """What keeps the router of a mixture of experts in order; see `dominie.losses.router_losses`.

    Attributes:
        weight: factor of load balancing, 0.01 in Switch Transformers.
        z_weight: factor of the z-loss, 0.001 in ST-MoE.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid", "strict": True}
    weight: float = 0.01
    z_weight: float = 0.0

    def __post_init__(self) -> None:
        _check_weight(self.weight)
        _check_weight(self.z_weight)


@dataclass(frozen=True, kw_only=True)
class LossTerms:
    """The terms of one source's loss; a term that is None or weighs 0 is not computed.

    Attributes:
        next_token: the labels of the data, the only term that needs no teacher.
        prediction: the teacher's next-token distributions.
        attention: the teacher's attention.
        router: load balancing, where the student is a mixture of experts.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid", "strict": True}
    next_token: NextToken | None = None
    prediction: Prediction | None = None
    attention: Attention | None = None
    router: Router | None = None

    def __post_init__(self) -> None:
        if not any(
            term and term.weight for term in (self.next_token, self.prediction, self.attention)
        ):
            beside = " beside router" if self.router else ""
            raise ValueError(f"a loss needs at least one term{beside} with a weight above 0")

    @property
    def needs_teacher(self) -> bool:
        """Whether any weighted term compares with a teacher."""
        return self.weighs("prediction") or self.weighs("attention")

    @property
    def needs_live_teacher(self) -> bool:
        """Whether a term compares with more than the sparse predictions that a cache keeps."""
        dense = self.prediction is not None and self.prediction.kind != "forward_kl"
        return self.weighs("attention") or dense

    def weighs(self, term: Term) -> bool:
        """Whether `term` is present with a weight above 0."""
        found = getattr(self, term)
        if isinstance(found, Router) and found.z_weight > 0.0:
            return True
        return found is not None and found.weight > 0.0
