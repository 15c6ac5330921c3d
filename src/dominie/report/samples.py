"""Which answers are shown side by side: those on which the models part ways."""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from dominie.report.formats import count

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from dominie.report.records import Sample


@dataclass(frozen=True)
class Answer:
    """What one model said."""

    model: str
    output: str
    score: float | None
    verdict: str | None = None
    invalid: bool = False


@dataclass(frozen=True)
class Comparison:
    """One prompt, what was asked for, and what every model said."""

    prompt: str
    target: str
    group: str | None
    answers: tuple[Answer, ...]

    @property
    def differs(self) -> bool:
        """Whether the answers are not all worth the same."""
        return len({answer.score for answer in self.answers}) > 1


@dataclass(frozen=True)
class Selection:
    """Comparisons to show, out of how many there were and how many of those differ."""

    shown: tuple[Comparison, ...]
    differing: int
    total: int


def selection(by_model: Mapping[str, Sequence[Sample]], most: int, length: int) -> Selection:
    """The prompts that tell the models apart best, spread over the families of the task.

    A prompt ranks by how far apart what the answers are worth lies: of answers right or wrong, by
    how evenly it splits the models. No model's successes are preferred to another's. Equal ranks
    keep the order of the task.

    Args:
        by_model: the rows of each model.
        most: how many prompts to show.
        length: how many characters of a text to show.
    """
    every = _comparisons(by_model)
    differing = [comparison for comparison in every if comparison.differs]
    families: dict[str | None, list[Comparison]] = defaultdict(list)
    for comparison in sorted(differing or every, key=_spread, reverse=True):
        families[comparison.group].append(comparison)
    chosen: list[Comparison] = []
    rank = 0
    while len(chosen) < most and any(rank < len(family) for family in families.values()):
        chosen += [family[rank] for family in families.values() if rank < len(family)]
        rank += 1
    shown = tuple(_cut(comparison, length) for comparison in chosen[:most])
    return Selection(shown, len(differing), len(every))


def _comparisons(by_model: Mapping[str, Sequence[Sample]]) -> list[Comparison]:
    """Rows joined by prompt and target; a prompt that stands twice is joined in its order."""
    joined: dict[tuple[str, str, int], list[tuple[str, Sample]]] = {}
    for model, rows in by_model.items():
        seen: dict[tuple[str, str], int] = defaultdict(int)
        for row in rows:
            key = (row.prompt, row.target)
            joined.setdefault((*key, seen[key]), []).append((model, row))
            seen[key] += 1
    return [
        Comparison(
            prompt,
            target,
            next((row.group for _, row in rows if row.group), None),
            tuple(
                Answer(model, row.output, row.score, row.verdict, row.invalid)
                for model, row in rows
            ),
        )
        for (prompt, target, _), rows in joined.items()
    ]


def _spread(comparison: Comparison) -> float:
    """Σ of squared differences between all pairs, up to a constant: n · Σ x² - (Σ x)²."""
    worth = [answer.score for answer in comparison.answers if answer.score is not None]
    spread = len(worth) * math.fsum(x * x for x in worth) - math.fsum(worth) ** 2
    return round(spread, 9)


def _cut(comparison: Comparison, length: int) -> Comparison:
    return Comparison(
        _shown(comparison.prompt, length),
        _shown(comparison.target, length),
        comparison.group,
        tuple(
            replace(
                answer,
                output=_shown(answer.output, length),
                verdict=answer.verdict and _shown(answer.verdict, length),
            )
            for answer in comparison.answers
        ),
    )


def _shown(text: str, length: int) -> str:
    if len(text) <= length:
        return text
    return f"{text[:length]}… [{count(len(text) - length)} more characters]"
