"""From what a model wrote to the answer in it: a match, a label, a list, pairs, a ranking."""

from __future__ import annotations

import json
import re
import string
from collections.abc import Collection, Iterable, Sequence
from typing import Any

from dominie.data.ecommerce_formats import listed

_ARTICLES = re.compile(r"\b(a|an|the)\b", re.I)
_PUNCTUATION = str.maketrans("", "", string.punctuation)
_NUMBER = re.compile(r"(?<![\w.])\d{1,9}(?![\w]|\.\d)")
_LETTER = re.compile(r"(?<!\w)[A-Za-z](?!\w)")
_BULLET = re.compile(r"^\s*(?:[-*•]|\d+[.)])\s+")
_NOTHING = {"none", "null", "n/a", ""}


def extracted(pattern: str | None, text: str) -> str | None:
    """The first group of the first match (the whole match without groups), None without a match."""
    if pattern is None:
        return text
    match = re.search(pattern, text)
    if match is None:
        return None
    return next((group for group in match.groups() if group is not None), match.group(0))


def normalised(text: str, ignore: Collection[str] = ()) -> str:
    """The text with runs of white space as one space, and without what is ignored."""
    if "case" in ignore:
        text = text.casefold()
    if "punctuation" in ignore:
        text = text.translate(_PUNCTUATION)
    if "articles" in ignore:
        text = _ARTICLES.sub(" ", text)
    return " ".join(text.split())


def label_of(text: str, labels: Sequence[str]) -> int | None:
    """Which label the text is, whatever its case and the full stop after it; None for none."""
    wanted = _label(text)
    return next((i for i, label in enumerate(labels) if _label(label) == wanted), None)


def spans(text: str) -> set[str]:
    """Spans in a text: a JSON list, else what commas, semicolons and line ends set apart."""
    found = listed(text)
    if found is None:
        parts = (part for line in text.splitlines() for part in re.split(r"[,;]", _unmarked(line)))
    else:
        parts = (str(part) for part in found if not isinstance(part, (dict, list)))
    return {span for part in parts if (span := _plain(part)) not in _NOTHING}


def pairs(text: str) -> set[tuple[str, ...]] | None:
    """Attributes and their values in a text; None where there is text but nothing of the kind.

    Read are a JSON list of objects with `attribute` and `value` (and `source`, then a part of the
    answer, as in ECInstruct), a JSON object from attribute to value or values, and lines or parts
    `attribute: value, value` (as in EcomInstruct). A value of none stands for no pair.
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
    """Items in the order given, numbered from 1, each but once.

    The first line with a number counts; in a text without numbers the first with a letter alone,
    where A, B, C … are 1, 2, 3 ….
    """
    for pattern in (_NUMBER, _LETTER):
        for line in text.splitlines():
            if found := pattern.findall(line):
                return list(dict.fromkeys(_number(item) for item in found))
    return []


def _number(item: str) -> int:
    return int(item) if item.isdecimal() else ord(item.upper()) - ord("A") + 1


def _label(text: str) -> str:
    return normalised(text, ("case",)).strip(" .!,;:\"'`*")


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
    return normalised(text, ("case",)).strip(" .\"'`")


def _unmarked(line: str) -> str:
    return _BULLET.sub("", line)
