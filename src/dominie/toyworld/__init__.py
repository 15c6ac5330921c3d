"""A small synthetic world of chats and tiny models, so that everything runs on a laptop CPU."""

from dominie.toyworld.names import is_toyworld, materialise

__all__ = ["is_toyworld", "materialise"]
