"""Reads answers in text (matches, labels, lists, pairs, rankings) and compares them."""

from __future__ import annotations

import json
import math
import re
import string
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from typing import Any

from dominie.data.ecommerce_formats import listed

_ARTICLES = re.compile(r"\b(a|an|the)\b", re.I)
_PUNCTUATION = str.maketrans("", "", string.punctuation)
_NUMBER = re.compile(r"(?<![\w.])\d{1,9}(?![\w]|\.\d)")
_LETTER = re.compile(r"(?<!\w)[A-Za-z](?!\w)")
_BULLET = re.compile(r"^\s*(?:[-*•]|\d+[.)])\s+")
_NOTHING = {"none", "null", "n/a", ""}


def extract(pattern: str | None, text: str) -> str | None:
    """Return the first group of the first match (the whole match without groups), else None."""
    if pattern is None:
        return text
    match = re.search(pattern, text)
    if match is None:
        return None
    return next((group for group in match.groups() if group is not None), match.group(0))


def normalise(text: str, ignore: Collection[str] = ()) -> str:
    """Return the text with runs of white space as one space, and without what is ignored."""
    if "case" in ignore:
        text = text.casefold()
    if "punctuation" in ignore:
        text = text.translate(_PUNCTUATION)
    if "articles" in ignore:
        text = _ARTICLES.sub(" ", text)
    return " ".join(text.split())


def label_of(text: str, labels: Sequence[str]) -> int | None:
    """Return which label the text is, case and punctuation around it ignored; None for none."""
    wanted = _label(text)
    return next((i for i, label in enumerate(labels) if _label(label) == wanted), None)


def spans(text: str) -> set[str]:
    """Return the spans of a text: a JSON list, else what commas, semicolons, line ends separate."""
    found = listed(text)
    if found is None:
        parts = (part for line in text.splitlines() for part in re.split(r"[,;]", _unmarked(line)))
    else:
        parts = (str(part) for part in found if not isinstance(part, (dict, list)))
    return {span for part in parts if (span := _plain(part)) not in _NOTHING}


def attribute_pairs(text: str) -> set[tuple[str, ...]] | None:
    """Return attributes with their values in a text; None if it is not empty and has none.

    Accepts a JSON list of objects with `attribute` and `value` (and `source`, then a part of the
    answer, as in ECInstruct), a JSON object from attribute to value or values, and lines or parts
    `attribute: value, value` (as in EcomInstruct). A value of none is no pair.
    """
    if not text.strip():
        return set()
    try:
        given = json.loads(text)
    except (ValueError, RecursionError):
        return _written_pairs(text)
    if isinstance(given, dict):
        if "attribute" in given and "value" in given:
            given = [given]
        else:
            return _kept((name, value) for name, one in given.items() for value in _values(one))
    if not isinstance(given, list):
        return None
    objects = [one for one in given if isinstance(one, dict) and {"attribute", "value"} <= set(one)]
    if given and not objects:
        return None
    return _kept(
        (one["attribute"], value, *([one["source"]] if "source" in one else []))
        for one in objects
        for value in _values(one["value"])
    )


def ranking(text: str) -> list[int]:
    """Return items in the order given, numbered from 1, each once.

    Reads the first line with a number; in a text without numbers the first with a single letter,
    A, B, C … being 1, 2, 3 ….
    """
    for pattern in (_NUMBER, _LETTER):
        for line in text.splitlines():
            if found := pattern.findall(line):
                return list(dict.fromkeys(_number(item) for item in found))
    return []


def _number(item: str) -> int:
    return int(item) if item.isdecimal() else ord(item.upper()) - ord("A") + 1


def _label(text: str) -> str:
    return normalise(text, ("case",)).strip(" .!,;:\"'`*")


def _written_pairs(text: str) -> set[tuple[str, ...]] | None:
    written: list[tuple[Any, Any]] = []
    for line in re.split(r"[\n;]", text):
        name, colon, values = _unmarked(line).partition(":")
        if colon:
            written += [(name, value) for value in values.split(",")]
    return _kept(written) if written else None


def _kept(found: Iterable[tuple[Any, ...]]) -> set[tuple[str, ...]]:
    plain = (tuple(_plain(str(part)) for part in one) for one in found)
    return {one for one in plain if one[1] not in _NOTHING}


def _values(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _plain(text: str) -> str:
    return normalise(text, ("case",)).strip(" .\"'`")


def _unmarked(line: str) -> str:
    return _BULLET.sub("", line)


# A word is letters and digits; scripts written without spaces have a word to a character.
_IDEOGRAPH = r"\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff"
_WORD = re.compile(rf"[{_IDEOGRAPH}]|[^\W_{_IDEOGRAPH}]+")


def token_f1(output: str, target: str) -> float:
    """Return F1 of the words two texts share, repetitions counted (Rajpurkar et al., 2016)."""
    mine, theirs = _WORD.findall(output.lower()), _WORD.findall(target.lower())
    return _f1((Counter(mine) & Counter(theirs)).total(), len(mine), len(theirs))


def rouge_l(output: str, target: str) -> float:
    """Return F1 of the longest common subsequence of words (Lin, ROUGE, 2004), no stemming."""
    mine, theirs = _WORD.findall(output.lower()), _WORD.findall(target.lower())
    return _f1(_longest_common(mine, theirs), len(mine), len(theirs))


def _f1(shared: int, mine: int, theirs: int) -> float:
    """Return 2 · shared / (mine + theirs); 1 if both are empty, since then they are the same."""
    return 2.0 * shared / (mine + theirs) if mine + theirs else 1.0


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
