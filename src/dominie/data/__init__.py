"""Conversations: read, split, rendered, tokenised, mixed, packed into batches. Knows no model."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dominie.data.tokenization import supervised_spans

__all__ = ["supervised_spans"]


def __getattr__(name: str) -> Any:
    """Import what is asked for when it is: child processes import this package too."""
    if name not in __all__:
        raise AttributeError(f"module 'dominie.data' has no attribute {name!r}")
    from dominie.data import tokenization

    return getattr(tokenization, name)
