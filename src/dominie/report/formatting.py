"""Numbers as people read them, and rich text: sentences with marked names of models and tasks."""

from __future__ import annotations

import math
import string
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

THIN = "\N{NARROW NO-BREAK SPACE}"
DASH = "\N{EN DASH}"
MINUS = "\N{MINUS SIGN}"


def percent(fraction: float | None, digits: int = 1) -> str:
    """A fraction in percent, without the sign: 0.769 is `76.9`."""
    return DASH if fraction is None else _sign(f"{100 * fraction:.{digits}f}")


def span(ends: tuple[float, float], *, rated: bool = False) -> str:
    """An interval of fractions in percent, `97.2–99.4`, or of ratings, `6.15–7.05`."""
    return f"{score_text(ends[0], rated=rated)}{DASH}{score_text(ends[1], rated=rated)}"


def rating(fraction: float) -> str:
    """A judge's rating from 1 to 10, which is kept as a fraction: 0.762 is `7.62`."""
    return f"{10 * fraction:.2f}"


def score_text(fraction: float, *, rated: bool = False) -> str:
    """A score without a unit: in percent, or a rating from 1 to 10."""
    return rating(fraction) if rated else percent(fraction)


def with_unit(fraction: float, *, rated: bool = False) -> str:
    """A score with its unit: in percent with the sign, or a rating from 1 to 10."""
    return rating(fraction) if rated else f"{percent(fraction)}{THIN}%"


def points(fraction: float, *, rated: bool = False) -> str:
    """The size of a difference of two fractions in points: of 100 (whole ones from ten on).

    Differences of ratings are in points of 10, as the ratings are.
    """
    if rated:
        return f"{abs(10 * fraction):.2f}"
    size = abs(100 * fraction)
    return f"{size:.0f}" if size >= 9.95 else f"{size:.1f}"


def signed_points(fraction: float, *, rated: bool = False) -> str:
    """The same with its sign: `+41.0`, of ratings `+0.35`."""
    return _sign(f"{10 * fraction:+.2f}" if rated else f"{100 * fraction:+.1f}")


def count(number: float | None) -> str:
    """A whole number with its thousands apart: `12,345`."""
    return DASH if number is None or not math.isfinite(number) else _sign(f"{number:,.0f}")


def size(number: float | None) -> str:
    """A large number in three digits: `1.06M`, `7.24B`."""
    if number is None or not math.isfinite(number):
        return DASH
    for bound, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(number) >= bound:
            return f"{number / bound:.3g}{unit}"
    return count(number)


def file_size(number: float) -> str:
    """A number of bytes in three digits: `1.06 MB`, `512 B`."""
    text = size(number)
    return f"{text[:-1]}{THIN}{text[-1]}B" if text[-1].isalpha() else f"{text}{THIN}B"


def duration(seconds: float | None) -> str:
    """A length of time in its two largest units: `59 s`, `3 min 20 s`, `2 h 05 min`."""
    if seconds is None or not math.isfinite(seconds) or seconds < 0:
        return DASH
    whole = round(seconds)
    hours, minutes, rest = whole // 3600, whole // 60 % 60, whole % 60
    if hours >= 48:
        return f"{hours // 24}{THIN}d {hours % 24}{THIN}h"
    if hours:
        return f"{hours}{THIN}h {minutes:02d}{THIN}min"
    if minutes:
        return f"{minutes}{THIN}min {rest:02d}{THIN}s"
    return f"{whole}{THIN}s" if seconds >= 9.5 else f"{seconds:.1f}{THIN}s"


def figure(value: float | None) -> str:
    """A measured quantity in three significant digits: `0.0763`, `2.31`, `1.2e-05`."""
    if value is None or not math.isfinite(value):
        return DASH
    if value == 0 or 1e-3 <= abs(value) < 1e4:
        digits = 0 if value == 0 else max(0, 2 - math.floor(math.log10(abs(value))))
        return _sign(f"{value:.{digits}f}")
    return _sign(f"{value:.1e}")


def shortened(text: str, length: int) -> str:
    """A text no longer than `length`, its middle left out: names differ at both ends."""
    if len(text) <= length:
        return text
    head = (length - 1) // 2
    return f"{text[:head]}…{text[len(text) - (length - 1 - head) :]}"


def listed(words: list[str]) -> str:
    """Words as a list in a sentence: `a, b and c`."""
    return " and ".join(part for part in (", ".join(words[:-1]), words[-1]) if part)


def _sign(number: str) -> str:
    """The number with a minus sign of the width of a plus; a rounded zero loses its sign."""
    if number.startswith("-") and not number.strip("-0.,"):
        return number[1:]
    return number.replace("-", MINUS, 1) if number.startswith("-") else number


@dataclass(frozen=True)
class Part:
    """A piece of rich text: words, or the name of a model or a task."""

    text: str
    kind: str = "text"  # or model, task


RichText = tuple[Part, ...]


def rich(template: str, **fields: str | RichText) -> RichText:
    """Fill a template: `{name:model}` and `{name:task}` mark names, `{name}` is any other text."""
    parts: list[Part] = []
    for text, name, kind, _ in string.Formatter().parse(template):
        parts += [Part(text)] if text else []
        if name is not None:
            value = fields[name]
            parts += [Part(value, kind or "text")] if isinstance(value, str) else value
    return tuple(parts)


def plain(rich_text: RichText) -> str:
    """Rich text as text for a terminal."""
    return "".join(part.text for part in rich_text)


def joined(items: Sequence[RichText], last: str = " and ") -> RichText:
    """Pieces of a sentence as a list in it: `a, b and c`."""
    parts: list[Part] = []
    for index, item in enumerate(items):
        if index:
            parts.append(Part(last if index == len(items) - 1 else ", "))
        parts += item
    return tuple(parts)
