"""Sentences whose names of models and tasks are set apart, for the page and the terminal alike."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from collections.abc import Sequence


@dataclass(frozen=True)
class Part:
    """A piece of a sentence: words, or the name of a model or a task."""

    text: str
    kind: Literal["text", "model", "task"] = "text"


Sentence = tuple[Part, ...]


def plain(sentence: Sentence) -> str:
    """A sentence as text for a terminal."""
    return "".join(part.text for part in sentence)


def joined(items: Sequence[Sentence]) -> Sentence:
    """Pieces of a sentence as a list in it: `a, b and c`."""
    parts: list[Part] = []
    for index, item in enumerate(items):
        if index:
            parts.append(Part(" and " if index == len(items) - 1 else ", "))
        parts += item
    return tuple(parts)
