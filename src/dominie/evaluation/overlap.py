"""How much two texts share: F1 of tokens, and ROUGE-L."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

# A word is letters and digits; scripts written without spaces have a word to a character.
_IDEOGRAPH = r"\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff"
_WORD = re.compile(rf"[{_IDEOGRAPH}]|[^\W_{_IDEOGRAPH}]+")


def words(text: str) -> list[str]:
    """The words of a text in lower case, without punctuation."""
    return _WORD.findall(text.lower())


def token_f1(output: str, target: str) -> float:
    """F1 of the words two texts share, repetitions counted (Rajpurkar et al., SQuAD, 2016)."""
    mine, theirs = words(output), words(target)
    return _f1((Counter(mine) & Counter(theirs)).total(), len(mine), len(theirs))


def rouge_l(output: str, target: str) -> float:
    """F1 of the longest common subsequence of words (Lin, ROUGE, 2004, section 3), no stemming."""
    mine, theirs = words(output), words(target)
    return _f1(_common(mine, theirs), len(mine), len(theirs))


def _f1(shared: int, mine: int, theirs: int) -> float:
    """2 · shared / (mine + theirs); 1 where both are empty, since then they are the same."""
    return 2.0 * shared / (mine + theirs) if mine + theirs else 1.0


def _common(a: Sequence[str], b: Sequence[str]) -> int:
    """Length of the longest common subsequence, in memory of one row."""
    row = [0] * (len(b) + 1)
    for word in a:
        before = 0
        for j, other in enumerate(b, 1):
            above = row[j]
            row[j] = before + 1 if word == other else max(above, row[j - 1])
            before = above
    return row[-1]
