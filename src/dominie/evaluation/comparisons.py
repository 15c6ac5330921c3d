"""How far models differ on the same questions, with what is left when both are asked the same."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dominie.evaluation.grades import Items
from dominie.evaluation.statistics import paired_differences
from dominie.evaluation.sums import STATISTICS


def compared(items: Mapping[str, Items]) -> dict[str, dict[str, Any]]:
    """The differences between all pairs of models on one task.

    Args:
        items: of each model, what its score was computed from.

    Returns:
        `{model: {other: {"difference", "interval": [low, high], "verdict"}}}`, the difference
        being the model's score less the other's, for models that answered the same questions.
    """
    found: dict[str, dict[str, Any]] = {}
    for alike in _alike(items):
        first = items[alike[0]]
        differences = paired_differences(
            {name: items[name].sums for name in alike},
            first.clusters,
            statistic=STATISTICS[first.statistic],
        )
        for (one, other), interval in differences.items():
            verdict = "within noise" if interval.within_noise else "better"
            if interval.high < 0:
                verdict = "worse"
            found.setdefault(one, {})[other] = {
                "difference": interval.estimate,
                "interval": [interval.low, interval.high],
                "verdict": verdict,
            }
    return found


def _alike(items: Mapping[str, Items]) -> list[list[str]]:
    """Models by what they were asked; those asked what nobody else was are left out."""
    by_questions: dict[tuple[Any, ...], list[str]] = {}
    for name, of_model in items.items():
        if of_model.statistic in STATISTICS:
            key = (of_model.statistic, tuple(of_model.clusters), len(of_model.sums[0]))
            by_questions.setdefault(key, []).append(name)
    return [names for names in by_questions.values() if len(names) > 1]
