"""What ends a stage before its last step: its settings, and the bounds that follow from them."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from dominie.core.errors import InputError
from dominie.core.references import SourceName

if TYPE_CHECKING:
    from dominie.training.stage_sources import StageSource


@dataclass(frozen=True, kw_only=True)
class StopAt:
    """What ends a stage before its last step; the last model before that is kept.

    Attributes:
        forgetting: the most that an evaluation may measure, in nats per token, of the KL of what
            the student began as to the student. By source, or one number for all that is held out
            and not to be learnt: sources that are only watched, and those that the student's start
            teaches.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid", "strict": True}
    forgetting: float | dict[SourceName, float]

    def bounds_watched(self, source: str) -> bool:
        """Whether a source that the stage does not learn from can end it."""
        return not isinstance(self.forgetting, dict) or source in self.forgetting

    def __post_init__(self) -> None:
        given = self.forgetting
        bounds = given if isinstance(given, dict) else {"": given}
        if not bounds:
            raise ValueError("forgetting names no source")
        for name, bound in bounds.items():
            if not 0 < bound < float("inf"):
                of = f" of {name}" if name else ""
                raise ValueError(f"forgetting{of} must be positive and finite, got {bound}")


def forgetting_bounds(stop_at: StopAt | None, sources: Sequence[StageSource]) -> dict[str, float]:
    """The most forgetting by source, in nats per token; none without `stop_at`.

    One number bounds what is held out of sources that are not to be learnt: those that are only
    watched, and those that the student's start teaches.
    """
    if stop_at is None:
        return {}
    bound = stop_at.forgetting
    if isinstance(bound, dict):
        return dict(bound)
    kept = (each for each in sources if not each.share or each.reference)
    return {each.name: bound for each in kept if len(each.validation)}


def check_bounds(
    stop_at: StopAt, sources: Sequence[StageSource], *, unknown: Collection[str], where: str
) -> None:
    """Refuse bounds on what is not held out.

    Args:
        stop_at: of a stage.
        sources: of the stage, with their rows.
        unknown: sources whose rows do not exist yet; what depends on them is not checked.
        where: the key in the recipe.

    Raises:
        InputError: a source without held-out rows, or a number that bounds none.
    """
    held_out = [source.name for source in sources if len(source.validation)]
    bounds = forgetting_bounds(stop_at, sources)
    for name in bounds:
        if name not in held_out and name not in unknown:
            raise InputError(
                f"nothing is held out of {name} that could tell how much is forgotten",
                where=where,
                expected=f"held-out conversations, as of {', '.join(held_out) or 'no source here'}",
                do=f"set data.{name}.validation_fraction, and train.evaluate_rows above 0",
            )
    if not bounds and not unknown:
        first = (held_out or ["general"])[0]
        raise InputError(
            "a number bounds what is not to be learnt, and there is no such source",
            where=where,
            expected="a held-out source that is only watched, or that the student's start teaches",
            found=f"held out and learnt: {', '.join(held_out)}" if held_out else "nothing held out",
            do=f"name the source, as {{{first}: {stop_at.forgetting}}}, or hold another one out "
            "(validation_fraction)",
        )
