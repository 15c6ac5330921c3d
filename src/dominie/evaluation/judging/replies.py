"""What an endpoint sent back, read without trusting it."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

_MOST_TOKENS = 10_000_000  # no call uses more; a server that says so is not believed


@dataclass(frozen=True)
class Reply:
    """A chat completion.

    Attributes:
        text: what the model said.
        cut: whether it was ended by its length limit.
        candidates: log-probabilities of the first token's alternatives, where they were given.
        usage: (prompt, reply) tokens where the server counted them believably.
    """

    text: str
    cut: bool = False
    candidates: Mapping[str, float] | None = None
    usage: tuple[int, int] | None = None


def read_reply(body: str) -> Reply | None:
    """The reply in the body of a response, None where it holds none."""
    try:
        tree = json.loads(body)
        choice = tree["choices"][0]
        text = choice["message"]["content"]
    except (ValueError, LookupError, TypeError, RecursionError):
        return None
    if not isinstance(text, str):
        return None
    return Reply(
        text=text,
        cut=choice.get("finish_reason") == "length",
        candidates=_candidates(choice),
        usage=_usage(tree.get("usage")),
    )


def _candidates(choice: Mapping[str, Any]) -> dict[str, float] | None:
    try:
        first: Sequence[Any] = choice["logprobs"]["content"][0]["top_logprobs"]
        found = {str(entry["token"]): float(entry["logprob"]) for entry in first}
    except (LookupError, TypeError, ValueError):
        return None
    believable = {t: p for t, p in found.items() if not math.isnan(p) and p <= 1e-6}
    return believable or None


def _usage(usage: Any) -> tuple[int, int] | None:
    if not isinstance(usage, dict):
        return None
    prompt, said = usage.get("prompt_tokens"), usage.get("completion_tokens")
    if not (type(prompt) is int and type(said) is int):
        return None
    believable = 0 <= prompt <= _MOST_TOKENS and 0 <= said <= _MOST_TOKENS
    return (prompt, said) if believable else None
