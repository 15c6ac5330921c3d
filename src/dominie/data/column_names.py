"""Columns that go by other names than those a row is known by, and what they should be called."""

from __future__ import annotations

from collections.abc import Iterable

_PROMPTS = ("question", "query", "input", "user", "request", "source", "text", "instruction")
_ANSWERS = ("answer", "response", "output", "assistant", "reply", "target", "completion", "label")


def renaming(columns: Iterable[str]) -> str | None:
    """What to do about a row of no known format; None where its columns tell nothing.

    Args:
        columns: of the row, as it names them.
    """
    by_word = {str(name).strip().lower(): str(name) for name in columns}
    if len(by_word) == 1:
        (name,) = by_word.values()
        for mark, said in ((";", "semicolons"), ("\t", "tabs"), ("|", "bars")):
            if mark in name:
                return f"its columns are separated by {said}: save the file with commas"
    prompt = next((by_word[word] for word in _PROMPTS if word in by_word), None)
    answer = next((by_word[word] for word in _ANSWERS if word in by_word), None)
    if prompt is None or answer is None:
        return None
    return f"rename its columns: `{prompt}` to `prompt`, `{answer}` to `completion`"
