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
from dominie.toyworld.unequal_families import LONG_GENERAL, SHORT_DOMAIN, TRAVEL

FAMILIES = {**GENERAL, **DOMAIN, **LONG_GENERAL, **SHORT_DOMAIN, **TRAVEL}
METRES = {"millimetres": 0.001, "centimetres": 0.01, "metres": 1.0, "kilometres": 1000.0}
KILOGRAMS = {"grams": 0.001, "kilograms": 1.0}


def drawn(family: str, count: int = 200) -> list[tuple[list[str], str]]:
    draw, rng = FAMILIES[family], Random(7)
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


def test_no_family_of_one_world_has_the_name_of_another() -> None:
    parts = (GENERAL, DOMAIN, LONG_GENERAL, SHORT_DOMAIN, TRAVEL)
    assert len(FAMILIES) == sum(map(len, parts))


@pytest.mark.parametrize("family", [*LONG_GENERAL, *SHORT_DOMAIN, *TRAVEL])
def test_a_prompt_has_one_right_answer(family: str) -> None:
    found: dict[str, str] = {}
    for words, answer in drawn(family, 4000):
        assert found.setdefault(" ".join(words), answer) == answer


def test_long_lists() -> None:
    for words, answer in drawn("long_repeat"):
        assert answer.split() == listed(words, "repeat", "say")[-len(answer.split()) :]
    for words, answer in drawn("long_reverse"):
        reply = answer.split()
        assert reply == words[-len(reply) :][::-1]
        assert len(words) - len(reply) in (2, 3)
    for words, answer in drawn("long_sort"):
        things = [word for word in words if word not in {"sort", "in", "order", ":", "?"}]
        assert answer.split() == sorted(things)
    for words, answer in drawn("long_opposite"):
        assert [OPPOSITE_OF[word] for word in answer.split()] == words[3:]
    for words, answer in drawn("pairs"):
        middle = len(words) // 2 + 1
        assert words[middle] == "and"
        assert answer.split()[::2] == words[3:middle]
        assert answer.split()[1::2] == words[middle + 1 :]
    for words, answer in drawn("copies"):
        assert answer.split() == [word for word in words[5:] for _ in range(int(words[3]))]


def test_long_facts_and_numbers() -> None:
    for words, answer in drawn("countries"):
        steps = [step.split() for step in answer.split(" , ")]
        assert [city for city, _, _ in steps] == words[3:-1]
        assert all(COUNTRY_OF_CITY[city] == country for city, _, country in steps)
    for words, answer in drawn("sums"):
        digits = [int(word) for word in words if word.isdecimal()]
        for place, step in enumerate(answer.split(" , "), start=1):
            before, _, rest = step.partition(" plus ")
            assert number(before.split()) == sum(digits[:place])
            assert number(rest.split()[2:]) == sum(digits[: place + 1])
        assert place == len(digits) - 1
    for words, answer in drawn("quantities"):
        told = " ".join(words[2:]).split(" , ")
        for quantity, step in zip(told, answer.split(" , "), strict=True):
            (*_, unit, _, stuff), (*_, into, _, same) = quantity.split(), step.split()
            scale = METRES if into in METRES else KILOGRAMS
            ratio = scale[unit] / scale[into]
            assert stuff == same
            assert number(step.split()) == pytest.approx(number(quantity.split()) * ratio)
    for words, answer in drawn("purchases"):
        *told, asked = " ".join(words).split(" . ")
        for record, step in zip(told, answer.split(" , "), strict=True):
            name, _, thing, _, city, _, coins = record.split()
            right = {"what ?": thing, "where ?": f"in {city}", "how many coins ?": f"{coins} coins"}
            assert step == f"{name} : {right[asked]}"
    for words, answer in drawn("letter"):
        assert answer.startswith(f"dear {words[1]} ,")
        assert answer.endswith(f"thanks , {words[-1]}")


def test_short_answers() -> None:
    for words, answer in drawn("short_attribute"):
        _, brand, size, colour, material, *_, asked, _ = words
        assert (
            answer == {"brand": brand, "size": size, "colour": colour, "material": material}[asked]
        )
    for words, answer in drawn("short_category"):
        assert answer == CATEGORY_OF_PRODUCT[words[-2]]
    for words, answer in drawn("short_title"):
        assert set(answer.split()) < set(words)
        assert answer.split()[-1] in CATEGORY_OF_PRODUCT
    for words, answer in drawn("short_stock"):
        shelf = dict(zip(words[2:-3:3], words[3:-3:3], strict=True))
        count = shelf[words[-2]]
        assert answer == (f"{count} left" if count != "0" else "sold out")
    for words, answer in drawn("short_price"):
        assert answer == f"{' '.join(words[4:6])} coins"
    for words, answer in drawn("short_returns"):
        assert RETURN_POLICY_OF_CATEGORY[CATEGORY_OF_PRODUCT[words[-2]]].endswith(answer)
    for words, answer in drawn("border"):
        assert answer == COUNTRY_OF_CITY[words[5]]
    for words, answer in drawn("harbour"):
        places = {words[3]: words[2], words[6]: words[5]}
        assert answer == f"in {places[words[-2]]}"
    for words, answer in drawn("trip"):
        right = {"who": words[2], "where": words[7], "coins": f"{words[8]} {words[9]} coins"}
        assert answer == {**right, "days": f"{words[11]} days"}[words[-2]]
