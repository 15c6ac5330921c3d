"""Forms in which texts of all scripts are compared: composed, folded, caseless, bare, in words."""

from __future__ import annotations

import string
import unicodedata
from collections.abc import Collection

import regex

#: Characters that separate the parts of a list, in the scripts that have their own.
COMMAS = ",、،፣᠂᠈߸꓾꘍꛵၊"
SEMICOLONS = ";؛፤꛶"

# What shows nothing and changes no word: joiners, direction marks, variation selectors.
_INVISIBLE = regex.compile(r"\p{Default_Ignorable_Code_Point}+")
# Full and half width, vertical and small variants of characters, by the blocks that hold them.
_WIDTHS = regex.compile(r"[\u3000\ufe10-\ufe19\ufe31-\ufe6b\uff01-\uffee]+")
_IDEOGRAPH = r"[\p{Han}\p{Hiragana}\p{Katakana}ー]"
_LOOSE_SPACE = regex.compile(rf"(?<={_IDEOGRAPH}) | (?={_IDEOGRAPH})")
_PUNCTUATION = regex.compile(rf"[\p{{P}}{regex.escape(string.punctuation)}]+")
_ARTICLES = regex.compile(r"\b(a|an|the)\b", regex.I)
# Punctuation that may surround an answer, but for signs that belong to a value: 5%, 6″, C#.
_AROUND, _OF_VALUES = {"Po", "Pi", "Pf", "Ps", "Pe"}, set("#%&@/\\‰‱٪؉؊′″‴")
# A word is letters, their marks and digits; each Chinese or Japanese character is a word.
_WORD = regex.compile(rf"(?V1){_IDEOGRAPH}\p{{M}}*|[[\p{{L}}\p{{M}}\p{{N}}]--{_IDEOGRAPH}]+")


def composed(text: str) -> str:
    """Return the text in Unicode's form C, in which equal characters are equal code points."""
    return unicodedata.normalize("NFC", text)


def fold(text: str) -> str:
    """Return the text composed, width variants as plain characters, without what is invisible."""
    text = str(_INVISIBLE.sub("", text.replace("\u200b", " ")))
    return composed(_WIDTHS.sub(lambda run: unicodedata.normalize("NFKC", run[0]), text))


def normalise(text: str, ignore: Collection[str] = ()) -> str:
    """Return the text folded, without what is ignored, with runs of white space as one space.

    White space beside a Chinese or Japanese character is left out: it means nothing there.
    """
    text = fold(text)
    if "case" in ignore:
        text = composed(unicodedata.normalize("NFD", text).casefold())
    if "punctuation" in ignore:
        text = _PUNCTUATION.sub("", text)
    if "articles" in ignore:
        text = _ARTICLES.sub(" ", text)
    return str(_LOOSE_SPACE.sub("", " ".join(text.split())))


def caseless(text: str) -> str:
    """Return the text normalised, its case ignored."""
    return normalise(text, ("case",))


def bare(text: str) -> str:
    """Return the text caseless, without punctuation around it; as it is if it is nothing else."""
    text = caseless(text)
    kept = [i for i, char in enumerate(text) if not _surrounds(char)]
    return text[kept[0] : kept[-1] + 1] if kept else text


def _surrounds(char: str) -> bool:
    return char in " `" or (unicodedata.category(char) in _AROUND and char not in _OF_VALUES)


def words(text: str) -> list[str]:
    """Return the words of a text, caseless."""
    return list(_WORD.findall(caseless(text)))
