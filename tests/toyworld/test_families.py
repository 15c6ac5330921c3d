"""The answers are right: worked out again from the words of the prompts alone."""

from __future__ import annotations

from random import Random

import pytest

from dominie.toyworld.families import DOMAIN, GENERAL
from dominie.toyworld.toy_models import (
    CATEGORY_OF_PRODUCT,
    COUNTRY_OF_CITY,
    OPPOSITE_OF,
    RETURN_POLICY_OF_CATEGORY,
)

METRES = {"millimetres": 0.001, "centimetres": 0.01, "metres": 1.0, "kilometres": 1000.0}
KILOGRAMS = {"grams": 0.001, "kilograms": 1.0}


def drawn(family: str, count: int = 200) -> list[tuple[list[str], str]]:
    draw, rng = {**GENERAL, **DOMAIN}[family], Random(7)
    return [(prompt.split(), answer) for prompt, answer in (draw(rng) for _ in range(count))]


def listed(words: list[str], *openings: str) -> list[str]:
    """The list within a prompt, without the words that ask for something."""
    return [word for word in words if word not in {*openings, ":", "?"}]


def number(words: list[str]) -> int:
    return int("".join(word for word in words if word.isdecimal()))


def test_lists() -> None:
    for words, answer in drawn("repeat"):
        assert answer.split() == listed(words, "repeat", "say")
    for words, answer in drawn("reverse"):
        assert answer.split() == listed(words, "reverse", "say", "backwards")[::-1]
    for words, answer in drawn("sort"):
        digits = listed(words, "sort", "in", "order")
        assert len(set(digits)) == len(digits)
        assert answer.split() == sorted(digits, key=int)
    for words, answer in drawn("pick"):
        things = words[3:]
        assert answer == things[{"first": 0, "middle": len(things) // 2, "final": -1}[words[0]]]
    for words, answer in drawn("opposite"):
        assert [OPPOSITE_OF[word] for word in answer.split()] == words[3:]


def test_numbers() -> None:
    for words, answer in drawn("add"):
        terms = [int(word) for word in words if word.isdecimal()]
        assert number(answer.split()) == sum(terms)
    for words, answer in drawn("convert"):
        *_, into = answer.split()
        unit = next(w for w in words if w in {*METRES, *KILOGRAMS} and w != into)
        scale = METRES if into in METRES else KILOGRAMS
        ratio = scale[unit] / scale[into]
        assert number(answer.split()) == pytest.approx(number(words) * ratio)


def test_facts_and_extraction() -> None:
    for words, answer in drawn("fact"):
        facts = CATEGORY_OF_PRODUCT if words[-2] == "category" else COUNTRY_OF_CITY
        assert answer in {facts.get(word) for word in words}
    for words, answer in drawn("extract"):
        name, _, thing, _, city, _, coins, *_ = words
        asked = " ".join(words[words.index(".") + 1 :])
        right = {"who ?": name, "what ?": thing, "where ?": city, "how many coins ?": coins}
        assert answer == right[asked]
    for words, answer in drawn("write"):
        assert {words[1], words[-1]} <= set(answer.split())


def test_articles() -> None:
    for words, answer in drawn("attribute"):
        _, brand, size, colour, material, *_, asked, _ = words
        right = {"brand": brand, "size": size, "colour": colour, "material": material}
        assert answer == f"{asked} : {right[asked]}"
    for words, answer in drawn("category"):
        assert answer == f"{CATEGORY_OF_PRODUCT[words[-2]]} , {words[-2]}"
    for words, answer in drawn("returns"):
        assert answer == RETURN_POLICY_OF_CATEGORY[CATEGORY_OF_PRODUCT[words[-2]]]
    for words, answer in drawn("title"):
        assert sorted(answer.split()) == sorted(listed(words, "title", ","))
        assert answer.split()[-1] in CATEGORY_OF_PRODUCT


def test_lookup() -> None:
    for words, answer in drawn("stock"):
        shelf = dict(zip(words[2:-3:3], words[3:-3:3], strict=True))
        asked = words[-2]
        count = shelf[asked]
        assert answer == (f"{asked} {count} left" if count != "0" else f"{asked} sold out")
    for words, answer in drawn("price"):
        product = words[3]
        assert answer == f"{product} {' '.join(words[4:6])} coins"
