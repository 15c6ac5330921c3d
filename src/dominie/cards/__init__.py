"""Model cards: the README.md that every model of a run carries."""

from dominie.cards.write import write_cards

__all__ = ["write_cards"]
