"""Families of the world of unequal lengths: long general answers, short ones for shop and travel.

Lengths are in supervised tokens, the end of the turn included: 5 to 60 for `LONG_GENERAL`, 2 to 4
for `SHORT_DOMAIN` and `TRAVEL`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from dominie.toyworld.families import Exchange, by_name, drawn_article, spelled
from dominie.toyworld.toy_models import (
    CATEGORY_OF_PRODUCT,
    CITIES,
    COLOURS,
    COUNTRY_OF_CITY,
    DIGITS,
    FOODS,
    MATERIALS,
    NAMES,
    NOUNS,
    OPPOSITE_OF,
    PRODUCTS,
    RETURN_POLICY_OF_CATEGORY,
    UNITS,
)

if TYPE_CHECKING:
    from random import Random


def _count(rng: Random, least: int, most: int) -> int:
    """A number of things: small ones are likelier, as short answers are among real ones."""
    return min(rng.randint(least, most), rng.randint(least, most))


def _nouns(rng: Random, least: int, most: int) -> list[str]:
    return rng.sample(NOUNS, _count(rng, least, most))


def long_repeat(rng: Random) -> Exchange:
    """A list of 4 to 24 words, word for word."""
    words = " ".join(_nouns(rng, 4, 24))
    return Exchange(rng.choice((f"repeat : {words}", f"say {words}")), words)


def long_reverse(rng: Random) -> Exchange:
    """A list of 4 to 10 words, last word first."""
    words = _nouns(rng, 4, 10)
    listed = " ".join(words)
    prompt = rng.choice((f"reverse : {listed}", f"say backwards : {listed}"))
    return Exchange(prompt, " ".join(reversed(words)))


def long_sort(rng: Random) -> Exchange:
    """Different digits in rising order, or names in that of the alphabet."""
    kind = rng.choice((DIGITS, NAMES))
    words = rng.sample(kind, _count(rng, 4, len(kind) - 2))
    listed = " ".join(words)
    prompt = rng.choice((f"sort : {listed}", f"{listed} in order ?"))
    return Exchange(prompt, " ".join(sorted(words)))


def long_opposite(rng: Random) -> Exchange:
    """The opposite of each of 4 to 20 words."""
    words = rng.sample(tuple(OPPOSITE_OF), _count(rng, 4, 20))
    answer = " ".join(OPPOSITE_OF[word] for word in words)
    return Exchange(f"opposite of : {' '.join(words)}", answer)


def pairs(rng: Random) -> Exchange:
    """Two lists of 2 to 8 words, a word of each in turn."""
    count = _count(rng, 2, 8)
    words = rng.sample(NOUNS, 2 * count)
    first, second = words[:count], words[count:]
    answer = " ".join(f"{a} {b}" for a, b in zip(first, second, strict=True))
    return Exchange(f"each of : {' '.join(first)} and {' '.join(second)}", answer)


def copies(rng: Random) -> Exchange:
    """Each of 2 to 10 words, two to four times."""
    times = rng.randint(2, 4)
    words = _nouns(rng, 2, 10)
    answer = " ".join(word for word in words for _ in range(times))
    return Exchange(f"say each for {times} : {' '.join(words)}", answer)


def countries(rng: Random) -> Exchange:
    """The country of each of 2 to 15 cities."""
    cities = rng.sample(CITIES, _count(rng, 2, 15))
    answer = " , ".join(f"{city} in {COUNTRY_OF_CITY[city]}" for city in cities)
    return Exchange(f"which country : {' '.join(cities)} ?", answer)


def sums(rng: Random) -> Exchange:
    """The sum of 2 to 8 digits, step by step."""
    first, *others = (rng.randint(1, 9) for _ in range(_count(rng, 2, 8)))
    total, steps = first, []
    for digit in others:
        steps.append(f"{spelled(total)} plus {digit} is {spelled(total + digit)}")
        total += digit
    listed = " ".join(map(str, (first, *others)))
    return Exchange(f"add {listed} for {rng.choice(NAMES)}", " , ".join(steps))


def quantities(rng: Random) -> Exchange:
    """One to four quantities, each in a smaller unit."""
    told, steps = [], []
    for _ in range(_count(rng, 1, 4)):
        (unit, smaller), zeros = rng.choice(tuple(UNITS.items()))
        number, stuff = spelled(rng.randint(1, 99)), rng.choice((*FOODS, *MATERIALS))
        told.append(f"{number} {unit} of {stuff}")
        steps.append(f"{number} {zeros} {smaller} of {stuff}")
    return Exchange(f"convert : {' , '.join(told)}", " , ".join(steps))


def purchases(rng: Random) -> Exchange:
    """One thing that was said of each of 2 to 5 purchases."""
    names = rng.sample(NAMES, _count(rng, 2, 5))
    asked = rng.choice(("what ?", "where ?", "how many coins ?"))
    told, answers = [], []
    for name in names:
        thing, city = rng.choice((*FOODS, *PRODUCTS)), rng.choice(CITIES)
        coins = rng.choice(DIGITS[1:])
        told.append(f"{name} buys {thing} in {city} for {coins}")
        right = {"what ?": thing, "where ?": f"in {city}", "how many coins ?": f"{coins} coins"}
        answers.append(f"{name} : {right[asked]}")
    return Exchange(f"{' . '.join(told)} . {asked}", " , ".join(answers))


def letter(rng: Random) -> Exchange:
    """A letter in the form its kind asks for, of 2 to 4 sentences."""
    name, sender = rng.sample(NAMES, 2)
    city, food, price = rng.choice(CITIES), rng.choice(FOODS), spelled(rng.randint(10, 99))
    product, colour = rng.choice(PRODUCTS), rng.choice(COLOURS)
    gift = f"{colour} {product}"
    category, country = CATEGORY_OF_PRODUCT[product], COUNTRY_OF_CITY[city]
    return rng.choice(
        (
            Exchange(
                f"write {name} about the {gift} for {price} coins by {sender}",
                f"dear {name} , the {gift} is here . return the {category} to the shop for {price} "
                f"coins in {price} days . thanks , {sender}",
            ),
            Exchange(
                f"thank {name} for the {gift} by {sender}",
                f"dear {name} , thanks for the {gift} . the {product} is in the {category} shop . "
                f"come to buy {colour} {category} . thanks , {sender}",
            ),
            Exchange(
                f"ask {name} to {city} for {food} by {sender}",
                f"dear {name} , come to {city} in {country} for {food} . "
                f"buy the {food} here in {country} . thanks , {sender}",
            ),
        )
    )


LONG_GENERAL = by_name(
    long_repeat,
    long_reverse,
    long_sort,
    long_opposite,
    pairs,
    copies,
    countries,
    sums,
    quantities,
    purchases,
    letter,
)


def short_attribute(rng: Random) -> Exchange:
    """One attribute of an article, out of its title."""
    listed = drawn_article(rng)
    asked = rng.choice(("brand", "size", "colour", "material"))
    return Exchange(f"listing {' '.join(listed.values())} : {asked} ?", listed[asked])


def short_category(rng: Random) -> Exchange:
    """The category of an article."""
    listed = drawn_article(rng)
    prompt = f"category : {listed['brand']} {listed['colour']} {listed['product']} ?"
    return Exchange(prompt, CATEGORY_OF_PRODUCT[listed["product"]])


def short_title(rng: Random) -> Exchange:
    """A seller's shuffled words as a short title: brand, colour, product."""
    listed = drawn_article(rng)
    words = [listed[key] for key in ("brand", "colour", "product")]
    shuffled = rng.sample((*words, listed["material"]), 4)
    return Exchange(f"title : {' , '.join(shuffled)} ?", " ".join(words))


def short_stock(rng: Random) -> Exchange:
    """How many of one of two products are left."""
    products, counts = rng.sample(PRODUCTS, 2), [rng.randint(0, 9) for _ in range(2)]
    asked = rng.randrange(2)
    shelf = " , ".join(f"{p} {n}" for p, n in zip(products, counts, strict=True))
    answer = f"{counts[asked]} left" if counts[asked] else "sold out"
    return Exchange(f"stock : {shelf} . {products[asked]} ?", answer)


def short_price(rng: Random) -> Exchange:
    """What an article costs, out of its line in the price list."""
    listed, cost = drawn_article(rng), spelled(rng.randint(10, 99))
    line = f"{listed['brand']} {listed['product']} {cost} coins , {rng.randint(1, 9)} left"
    return Exchange(f"price : {line} ?", f"{cost} coins")


def short_returns(rng: Random) -> Exchange:
    """For how many days the shop takes an article back, which its category decides."""
    listed = drawn_article(rng)
    prompt = f"return : {listed['brand']} {listed['material']} {listed['product']} ?"
    policy = RETURN_POLICY_OF_CATEGORY[CATEGORY_OF_PRODUCT[listed["product"]]]
    return Exchange(prompt, " ".join(policy.split()[-3:]))


SHORT_DOMAIN = by_name(
    short_attribute, short_category, short_title, short_stock, short_price, short_returns
)


def _trip(rng: Random) -> tuple[str, str, str, str, str]:
    """Its traveller, both cities, its price and its days."""
    start, end = rng.sample(CITIES, 2)
    return rng.choice(NAMES), start, end, spelled(rng.randint(10, 99)), rng.choice(DIGITS[1:])


def trip(rng: Random) -> Exchange:
    """One thing that was said of a trip."""
    name, start, end, cost, days = _trip(rng)
    asked = rng.choice(("who", "where", "coins", "days"))
    right = {"who": name, "where": end, "coins": f"{cost} coins", "days": f"{days} days"}
    told = f"{name} lives in {start} to {end} {cost} coins {days} days"
    return Exchange(f"station : {told} , {asked} ?", right[asked])


def border(rng: Random) -> Exchange:
    """The country of the city in which a trip ends."""
    name, start, end, _, days = _trip(rng)
    return Exchange(f"station : {name} {start} to {end} {days} , country ?", COUNTRY_OF_CITY[end])


def harbour(rng: Random) -> Exchange:
    """The city of two in which a thing is sold."""
    things, cities = rng.sample((*FOODS, *PRODUCTS), 2), rng.sample(CITIES, 2)
    asked = rng.randrange(2)
    told = " , ".join(f"{city} {thing}" for city, thing in zip(cities, things, strict=True))
    return Exchange(f"harbour : {told} . {things[asked]} ?", f"in {cities[asked]}")


TRAVEL = by_name(trip, border, harbour)
