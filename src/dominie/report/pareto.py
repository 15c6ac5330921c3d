"""The Pareto front of two scores: what nothing else here matches on both and beats on one."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping


def pareto_front(places: Mapping[str, tuple[float, float]]) -> list[str]:
    """The names on the front, from left to right.

    Args:
        places: two scores of each name, both better when higher. Names in one place share it.
    """
    kept = [
        name
        for name, place in places.items()
        if not any(_beats(other, place) for other in places.values())
    ]
    return sorted(kept, key=lambda name: (places[name][0], -places[name][1]))


def _beats(one: tuple[float, float], other: tuple[float, float]) -> bool:
    """Whether one is at least as good on both scores and better on one."""
    return one[0] >= other[0] and one[1] >= other[1] and one != other
