"""Whether Python code that lies beside a model may run: only where the command line says so.

No recipe, no configuration and no environment variable can allow it, since those come with what
others wrote.
"""

from __future__ import annotations

OPTION = "--trust-remote-code"

_allowed = False


def allow(value: bool) -> None:
    """Say whether this process may run it."""
    global _allowed
    _allowed = value


def allowed() -> bool:
    """Whether this process may run it: what `trust_remote_code` is set to."""
    return _allowed


def passed_on() -> list[str]:
    """The option again, for a command that this process starts."""
    return [OPTION] if _allowed else []


def is_asked_for(error: Exception) -> bool:
    """Whether a loader failed because it may not run a model's code."""
    return not _allowed and "trust_remote_code" in str(error)
