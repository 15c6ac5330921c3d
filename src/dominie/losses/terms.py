"""Chooses the terms of a loss: the recipe's `loss`, one field for each term there is.

`L = next_token.weight·CE + prediction.weight·T²·D(teacher, student) + attention.weight·KL(maps)`,
each summed over the supervised tokens. The paper's `(1−λ)·CE + λ·(L_pred + L_attn)` is these
weights set to 1−λ, λ and λ. A mixture of experts may have a term for its router beside them.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, ClassVar

from dominie.losses.attention import Attention
from dominie.losses.objective import Term
from dominie.losses.router_losses import Router
from dominie.losses.vocabulary_terms import NextToken, Prediction

__all__ = ["Attention", "LossTerms", "NextToken", "Prediction", "Router"]


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
    #: Terms that are measured for every source, whether they weigh anything or not.
    always: ClassVar[dict[str, Term]] = {"next_token": NextToken(weight=0.0)}
    next_token: NextToken | None = None
    prediction: Prediction | None = None
    attention: Attention | None = None
    router: Router | None = None

    def __post_init__(self) -> None:
        if not any(term.suffices and term.weighs for term in self.present.values()):
            beside = " beside router" if self.router else ""
            raise ValueError(f"a loss needs at least one term{beside} with a weight above 0")

    @property
    def names(self) -> list[str]:
        """Names of all terms there are, in order."""
        return [each.name for each in fields(self)]

    @property
    def present(self) -> dict[str, Term]:
        """The terms that are given, by name."""
        found = {name: getattr(self, name) for name in self.names}
        return {name: term for name, term in found.items() if term is not None}

    def measured(self, name: str) -> Term | None:
        """A term as it is computed: as given, else as it is measured for every source."""
        return self.present.get(name) or self.always.get(name)

    def weighs(self, name: str) -> bool:
        """Whether a term is given and adds anything to the loss."""
        return name in self.present and self.present[name].weighs

    @property
    def needs_teacher(self) -> bool:
        """Whether any term that weighs compares with a teacher."""
        weighed = (term for term in self.present.values() if term.weighs)
        return any(term.needs & {"distribution", "attention"} for term in weighed)

    @property
    def needs_live_teacher(self) -> bool:
        """Whether a term compares with more than the sparse predictions that a cache keeps."""
        return any(term.needs_live_teacher for term in self.present.values())
