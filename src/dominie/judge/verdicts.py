"""Reads a verdict from a judge's reply; a doubtful one is unscored.

The last well-formed verdict counts, because judges are asked to explain first and may mention
others on the way. A verdict inside words of the judged answer is a quotation and does not count.
"""

from __future__ import annotations

import ast
import math
import re
from collections.abc import Iterator, Mapping, Sequence

from dominie.generation.client import Reply

LOWEST, HIGHEST = 1.0, 10.0

_BRACKETS = re.compile(r"\[\[\s*([^\[\]]{1,16}?)\s*\]\]")
_NUMBER = re.compile(r"\d{1,4}(?:\.\d{1,6})?")
# What a quotation shares with the answer beyond the verdict itself; "Rating: " is shorter.
_TELLING = 8
_LEAST_MASS = 0.01


def rating(reply: Reply, quoted: Sequence[str]) -> float | None:
    """The last number in double brackets from 1 to 10, None without one.

    Args:
        reply: of the judge.
        quoted: the answers it was shown.
    """
    found = [text for text in _bracketed(reply, quoted) if _NUMBER.fullmatch(text)]
    last = _last([text for text in found if LOWEST <= float(text) <= HIGHEST], quoted)
    return None if last is None else float(last)


def letter(reply: Reply, quoted: Sequence[str], letters: str = "ABC") -> str | None:
    """The last of the letters in double brackets, None without one."""
    found = [text for text in _bracketed(reply, quoted) if len(text) == 1 and text in letters]
    return _last(found, quoted)


def ranking(reply: Reply, quoted: Sequence[str]) -> float | None:
    """A preference from a list of `{'model': …, 'rank': …}`: 1 for model_1, 2 for model_2.

    The last list of the reply counts, and it has to rank both models, one above the other.
    """
    found = None
    for match in re.finditer(r"\[\s*\{[^\[\]]{1,400}\}\s*,?\s*\]", reply.text):
        if _is_quoted(reply.text, match.span(), quoted):
            continue
        try:
            entries = ast.literal_eval(match.group())
            ranks = {entry["model"]: entry["rank"] for entry in entries}
        except (ValueError, SyntaxError, TypeError, KeyError, RecursionError, MemoryError):
            continue
        if len(entries) == 2 and ranks in (
            {"model_1": 1, "model_2": 2},
            {"model_1": 2, "model_2": 1},
        ):
            found = float(ranks["model_1"])
    return found


def identifier(reply: Reply, quoted: Sequence[str]) -> float | None:  # noqa: ARG001
    """A preference from the first token, `m` or `M`: 1 + P(M) / (P(m) + P(M)).

    Where the endpoint gives no log-probabilities, the reply has to be one of the two and nothing
    else, and is worth 1 or 2. Where both are improbable, the judge wanted to say something else.
    """
    if reply.candidates is not None:
        first, second = (_probability(reply.candidates, name) for name in ("m", "M"))
        total = first + second
        return 1.0 + second / total if total >= _LEAST_MASS else None
    return {"m": 1.0, "M": 2.0}.get(reply.text.rpartition("</think>")[2].strip())


def disarmed(text: str) -> str:
    """A text whose verdict-like parts are spaced out, so that quoting it gives no verdict."""
    return _BRACKETS.sub(
        lambda m: f"[ [{m[1]}] ]" if _looks_like_a_verdict(m[1]) else m.group(), text
    )


def _bracketed(reply: Reply, quoted: Sequence[str]) -> Iterator[str]:
    """What stands in double brackets, quotations left out. A reply cut off has no last word."""
    if reply.cut:
        return
    for match in _BRACKETS.finditer(reply.text):
        if not _is_quoted(reply.text, match.span(), quoted):
            yield match[1]


def _last(found: Sequence[str], quoted: Sequence[str]) -> str | None:
    """The last verdict; one that an answer speaks of as well counts only where there is no other.

    "[[2]]. Note that the answer asks for [[10]]" repeats nothing but the verdict itself.
    """
    spoken_of = {text for answer in quoted for text in _BRACKETS.findall(answer)}
    own = [text for text in found if text not in spoken_of] or found
    return own[-1] if own else None


def _looks_like_a_verdict(text: str) -> bool:
    return bool(_NUMBER.fullmatch(text)) or (len(text) == 1 and text.isupper())


def _probability(candidates: Mapping[str, float], token: str) -> float:
    """Of a token, whether or not the tokenizer writes a space before it."""
    return math.fsum(math.exp(p) for name, p in candidates.items() if name.strip() == token)


def _is_quoted(reply: str, span: tuple[int, int], quoted: Sequence[str]) -> bool:
    """Whether a verdict stands in words that the reply shares with an answer, white space aside."""
    before = _compact(reply[max(0, span[0] - 400) : span[0]])
    verdict = _compact(reply[slice(*span)])
    after = _compact(reply[span[1] : span[1] + 400])
    return any(_shared(before, verdict, after, _compact(answer)) for answer in quoted)


def _shared(before: str, verdict: str, after: str, answer: str) -> bool:
    start = answer.find(verdict)
    while start >= 0:
        end = start + len(verdict)
        left = _common(before[::-1], answer[:start][::-1])
        right = _common(after, answer[end:])
        if left + right >= min(_TELLING, len(answer) - len(verdict)):
            return True
        start = answer.find(verdict, start + 1)
    return False


def _common(one: str, other: str) -> int:
    """How many characters two texts begin with alike."""
    pairs = zip(one, other, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))


def _compact(text: str) -> str:
    """Letters and signs alone: quotations change white space, case, quotes and backslashes."""
    return re.sub(r"[\s\\>*_`'\"“”‘’]+", "", text).casefold()
