"""Reads answers in text (matches, labels, lists, pairs, rankings) and compares them."""

from __future__ import annotations

import ast
import contextlib
import json
import math
import re
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from dominie.data.ecommerce_formats import listed
from dominie.evaluation.text_forms import (
    COMMAS,
    SEMICOLONS,
    bare,
    caseless,
    composed,
    fold,
    normalise,
    words,
)

_COMMA, _SEMICOLON = re.compile(f"[{COMMAS}]"), re.compile(f"[{SEMICOLONS}]")
_SEPARATOR, _COLON = re.compile(f"[{COMMAS}{SEMICOLONS}]"), re.compile("[:∶꞉៖፥፦]")
# What joins a digit or a letter beside it to one word or code: digits, and the letters of Latin,
# Greek, Cyrillic, Armenian. Elsewhere counters and particles follow without a space: 第3, 2번.
_JOINING = r"A-Za-z\u00c0-\u058f\d_"
_NUMBER = re.compile(rf"(?<![{_JOINING}.٫])\d{{1,9}}(?![{_JOINING}]|[.٫]\d)")
_LETTER = re.compile(rf"(?<![{_JOINING}])(?<![A-Za-z]['’])[A-Za-z](?![{_JOINING}]|['’][A-Za-z])")
_CIRCLED = {ord("①") + number: f" {number + 1} " for number in range(20)}
_BULLET = re.compile(
    r"^\s*(?:[-*–—]\s+|[•·・●○▪◦‣①-⑳]\s*|\(\d+\)\s*|\d+[.)](?:\s+|(?=[^\x00-\x7f]))|\d+、(?!\d))"
)
_NUMBERED = re.compile(r"\s*(\d{1,4})[.)]\s+(\S.*)")
_FENCE = re.compile(r"^[ \t]*(?:`{3,}|~{3,})[\w+-]*[ \t]*$", re.M)
# Where JSON or a Python literal begins. A bracket before a word or a number is one of prose.
_OPENING = re.compile(r"[\[{](?=\s*[\[{]?\s*[\"'“‘\]}])")
_BRACKET_OR_QUOTE = re.compile(r"\"(?:[^\"\\]|\\.)*\"|'(?:[^'\\]|\\.)*'|[\[\](){}]", re.S)
_STRAIGHT = str.maketrans("“”„‟‘’", '""""\'\'')
_NOTHING = {"none", "null", "n/a", ""}


def extract(pattern: str | None, text: str) -> str | None:
    """Return the first group of the first match (the whole match without groups), else None.

    The text is matched as it stands, else composed, else folded. A single letter that is cut out
    of a word, such as the B of "Based on", is no match.
    """
    if pattern is None:
        return text
    for form in dict.fromkeys((text, composed(text), fold(text))):
        for match in re.finditer(pattern, form):
            group = next((i for i, one in enumerate(match.groups(), 1) if one is not None), 0)
            found, at = match[group], match.start(group)
            if not re.fullmatch("[A-Za-z]", found) or _LETTER.match(form, at):
                return found
    return None


def label_of(text: str, labels: Sequence[str]) -> int | None:
    """Return which label the text is, case and punctuation around it ignored; None for none.

    A label that is the same in case, or in punctuation, goes before one that is not.
    """
    for form in (normalise, caseless, bare):
        wanted = form(text)
        for i, label in enumerate(labels):
            if form(label) == wanted:
                return i
    return None


def spans(text: str) -> set[str]:
    """Return the spans of a text: those of its lists, else what separators set apart.

    A list is one of JSON or Python, whatever stands around it. Separators are line ends, and the
    commas and semicolons of all scripts.
    """
    given = listed(text)
    data = [given] if given is not None else _data(text)
    parts = [part for value in data or () for part in _span_parts(value)]
    if not data:
        lines = _FENCE.sub("", fold(text)).splitlines()
        parts = [part for line in lines for part in _SEPARATOR.split(_BULLET.sub("", line, 1))]
    return {span for part in parts if (span := bare(part)) not in _NOTHING}


def _span_parts(value: Any) -> list[str]:
    """Return the texts of a list, or of the lists that are the values of an object."""
    lists = value.values() if isinstance(value, dict) else [value]
    parts = (part for one in lists for part in _values(one))
    return [str(part) for part in parts if not isinstance(part, (dict, list))]


def attribute_pairs(text: str) -> set[tuple[str, ...]] | None:
    """Return attributes with their values in a text; None if it is not empty and has none.

    Accepts a JSON list of objects with `attribute` and `value` (and `source`, then a part of the
    answer, as in ECInstruct), a JSON object from attribute to value or values, both also as Python
    writes them and whatever stands around them, and lines or parts `attribute: value, value` (as
    in EcomInstruct). A value of none is no pair. Lists that are broken off are none.
    """
    if not text.strip():
        return set()
    data = _data(text)
    if data == []:
        return _written_pairs(text)
    read = [found for value in data or () if (found := _pairs(value)) is not None]
    return _kept(pair for found in read for pair in found) if read else None


def _data(text: str) -> list[Any] | None:
    """Return the lists and objects of JSON or Python in a text, None if one cannot be read."""
    if text.lstrip().startswith('"'):  # JSON within a text of JSON
        with contextlib.suppress(ValueError):
            inner = json.loads(text)
            text = inner if isinstance(inner, str) else text
    return _literals(text) or _literals(fold(text).translate(_STRAIGHT))


def _literals(text: str) -> list[Any] | None:
    found, opening = [], _OPENING.search(text)
    while opening:
        try:
            value, end = json.JSONDecoder(strict=False).raw_decode(text, opening.start())
        except (ValueError, RecursionError):
            end = _closing(text, opening.start())
            value = _python_literal(text[opening.start() : end])
        if value is None:
            return None
        found.append(value)
        opening = _OPENING.search(text, end)
    return found


def _python_literal(text: str) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of escapes that Python does not know
        try:
            found = ast.literal_eval(text)
        except (ValueError, SyntaxError, RecursionError, MemoryError, TypeError):
            return None
    return list(found) if isinstance(found, set) else found


def _closing(text: str, start: int) -> int:
    """Return where the bracket that opens at `start` is closed, else `start`."""
    depth = 0
    for match in _BRACKET_OR_QUOTE.finditer(text, start):
        depth += {"[": 1, "{": 1, "(": 1, "]": -1, "}": -1, ")": -1}.get(match[0], 0)
        if depth == 0:
            return match.end()
    return start


def _pairs(value: Any) -> list[tuple[Any, ...]] | None:
    """Return the attributes and values that a list or an object holds, None if it is another."""
    if isinstance(value, dict):
        return _pairs_of_object(value)
    if not isinstance(value, list):
        return None
    objects = [one for one in value if isinstance(one, dict) and "attribute" in _keys(one)]
    read = [found for one in objects if (found := _pairs_of_object(one)) is not None]
    return [pair for found in read for pair in found] if read or not value else None


def _pairs_of_object(given: dict[Any, Any]) -> list[tuple[Any, ...]] | None:
    keys = _keys(given)
    if "attribute" in keys:
        source = [keys["source"]] if "source" in keys else []
        values = _values(keys["value"]) if "value" in keys else [{}]
        found = [(keys["attribute"], value, *source) for value in values]
        return None if any(isinstance(value, (dict, list)) for _, value, *_ in found) else found
    pairs: list[tuple[Any, ...]] = []
    for name, one in given.items():
        if isinstance(one, dict) or any(isinstance(value, dict) for value in _values(one)):
            inner = _pairs(one)  # an object around the list, such as {"attributes": […]}
            if inner is None:
                return None
            pairs += inner
        else:
            pairs += [(name, value) for value in _values(one)]
    return pairs


def _keys(given: dict[Any, Any]) -> dict[str, Any]:
    return {str(key).strip().casefold(): value for key, value in given.items()}


def _written_pairs(text: str) -> set[tuple[str, ...]] | None:
    text = _FENCE.sub("", fold(text)).strip()
    if re.fullmatch(r"\[.*\]|\{.*\}", text, re.S):
        return None
    written: list[tuple[str, str]] = []
    for part in (part for line in text.splitlines() for part in _SEMICOLON.split(line)):
        name, *rest = _COLON.split(_BULLET.sub("", part, 1), 1)
        written += [(name, value) for values in rest for value in _COMMA.split(values)]
    return _kept(written) if written else None


def _kept(found: Iterable[tuple[Any, ...]]) -> set[tuple[str, ...]]:
    plain = (tuple(bare(str(part)) for part in one) for one in found)
    return {one for one in plain if one[1] not in _NOTHING}


def _values(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def ranking(text: str) -> list[int]:
    """Return items in the order given, numbered from 1, each once.

    Reads a numbered list of items, else the first line with a number; in a text without numbers
    the first with a single letter, A, B, C … being 1, 2, 3 ….
    """
    text = fold(text.translate(_CIRCLED))
    numbered = [entry for line in text.splitlines() if (entry := _NUMBERED.fullmatch(line))]
    if len(numbered) > 1 and all(int(entry[1]) == i for i, entry in enumerate(numbered, 1)):
        text = ", ".join(entry[2] for entry in numbered)  # a place and an item on each line
    for pattern in (_NUMBER, _LETTER):
        for line in text.splitlines():
            if found := pattern.findall(line):
                return list(dict.fromkeys(_number(item) for item in found))
    return []


def _number(item: str) -> int:
    return int(item) if item.isdecimal() else ord(item.upper()) - ord("A") + 1


def token_f1(output: str, target: str) -> float:
    """Return F1 of the words two texts share, repetitions counted (Rajpurkar et al., 2016)."""
    return _f1(output, target, lambda a, b: (Counter(a) & Counter(b)).total())


def rouge_l(output: str, target: str) -> float:
    """Return F1 of the longest common subsequence of words (Lin, ROUGE, 2004), no stemming."""
    return _f1(output, target, _longest_common)


def _f1(output: str, target: str, shared: Callable[[list[str], list[str]], int]) -> float:
    """Return 2 · shared / words of both; of two texts without words, whether they are the same."""
    mine, theirs = words(output), words(target)
    if not mine and not theirs:
        return float(caseless(output) == caseless(target))
    return 2.0 * shared(mine, theirs) / (len(mine) + len(theirs))


def _longest_common(a: Sequence[str], b: Sequence[str]) -> int:
    """Return the length of the longest common subsequence, in memory of one row."""
    row = [0] * (len(b) + 1)
    for word in a:
        before = 0
        for j, other in enumerate(b, 1):
            above = row[j]
            row[j] = before + 1 if word == other else max(above, row[j - 1])
            before = above
    return row[-1]


def ndcg(ranked: Sequence[int], relevances: Sequence[float], k: int | None = None) -> float:
    """Return normalised discounted cumulative gain, gain 2^relevance - 1 (Burges et al., 2005).

    Args:
        ranked: items numbered from 1, the best first, none twice; unknown numbers gain nothing.
        relevances: of the items in their order.
        k: places that count; None counts all.

    Returns:
        From 0 to 1; 0 if nothing is relevant.
    """
    gains = [relevances[i - 1] if 1 <= i <= len(relevances) else 0.0 for i in ranked]
    best = _discounted(sorted(relevances, reverse=True)[:k])
    return min(1.0, _discounted(gains[:k]) / best) if best > 0 else 0.0


def _discounted(gains: Sequence[float]) -> float:
    return math.fsum(
        (2.0**gain - 1.0) / math.log2(place + 1) for place, gain in enumerate(gains, 1)
    )
