"""A source as a stage that trains names it: its share, teacher, loss, and who answers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from dominie.core.references import ModelName
from dominie.losses.terms import LossTerms
from dominie.recipe.stage_config import STRICT


@dataclass(frozen=True, kw_only=True)
class MixedSource:
    """A source within a stage.

    Attributes:
        share: fraction of the stage's conversations; shares are normalised to sum to one.
        teacher: of this source; None is the stage's teacher.
        loss: the loss on this source; None is the stage's loss.
        cache: whether its teacher is replaced by a cache; None is the stage's `cache`.
        on_policy: fraction of its conversations whose last answer the student writes anew, for the
            teacher to mark; None is none.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT
    share: float
    teacher: ModelName | None = None
    loss: LossTerms | None = None
    cache: bool | None = None
    on_policy: float | None = None

    def __post_init__(self) -> None:
        if self.on_policy is not None and not 0.0 <= self.on_policy <= 1.0:
            raise ValueError(f"on_policy must be from 0 to 1, got {self.on_policy}")
        if not 0.0 <= self.share < float("inf"):
            raise ValueError(f"share must be finite and not negative, got {self.share}")
