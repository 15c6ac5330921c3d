"""Families of questions with one right answer each: general ones, and the shop's."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, TypeAlias

from dominie.toyworld.toy_models import (
    ANIMALS,
    BRANDS,
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
    SIZES,
    UNITS,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from random import Random


class Exchange(NamedTuple):
    """One question to the assistant and the answer, as words between single spaces."""

    prompt: str
    answer: str


Family: TypeAlias = "Callable[[Random], Exchange]"


def by_name(*families: Family) -> Mapping[str, Family]:
    """Families of a source, by their names and in this order."""
    return {family.__name__: family for family in families}


def spelled(number: int) -> str:
    """The number as the world writes it, digit by digit: 42 is `4 2`."""
    return " ".join(str(number))


def _nouns(rng: Random, least: int = 2, most: int = 4) -> list[str]:
    return rng.sample(NOUNS, rng.randint(least, most))


def repeat(rng: Random) -> Exchange:
    """A list, word for word."""
    words = " ".join(_nouns(rng))
    return Exchange(rng.choice((f"repeat : {words}", f"say {words}")), words)


def reverse(rng: Random) -> Exchange:
    """A list, last word first."""
    words = _nouns(rng)
    listed = " ".join(words)
    prompt = rng.choice((f"reverse : {listed}", f"say backwards : {listed}"))
    return Exchange(prompt, " ".join(reversed(words)))


def sort(rng: Random) -> Exchange:
    """Different digits in rising order."""
    digits = rng.sample(DIGITS, rng.randint(3, 5))
    listed = " ".join(digits)
    prompt = rng.choice((f"sort : {listed}", f"{listed} in order ?"))
    return Exchange(prompt, " ".join(sorted(digits)))


def pick(rng: Random) -> Exchange:
    """The word at a named place of a list."""
    words = rng.sample(NOUNS, rng.choice((3, 5)))
    place = rng.choice(("first", "middle", "final"))
    index = {"first": 0, "middle": len(words) // 2, "final": -1}[place]
    return Exchange(f"{place} of : {' '.join(words)}", words[index])


def opposite(rng: Random) -> Exchange:
    """The opposite of every word of a list."""
    words = rng.sample(tuple(OPPOSITE_OF), rng.randint(2, 4))
    answer = " ".join(OPPOSITE_OF[word] for word in words)
    return Exchange(f"opposite of : {' '.join(words)}", answer)


def extract(rng: Random) -> Exchange:
    """One of the things that were said of a purchase."""
    name, thing, city = rng.choice(NAMES), rng.choice((*FOODS, *PRODUCTS)), rng.choice(CITIES)
    coins = rng.choice(DIGITS[1:])
    question, answer = rng.choice(
        (("who ?", name), ("what ?", thing), ("where ?", city), ("how many coins ?", coins))
    )
    return Exchange(f"{name} buys {thing} in {city} for {coins} coins . {question}", answer)


def fact(rng: Random) -> Exchange:
    """One fact beyond what the question says: a city's country or a product's category."""
    name, city, product = rng.choice(NAMES), rng.choice(CITIES), rng.choice(PRODUCTS)
    if rng.random() < 0.5:
        prompt = f"{name} buys {rng.choice(COLOURS)} {product} . which category ?"
        return Exchange(prompt, CATEGORY_OF_PRODUCT[product])
    lives = f"{name} lives in {city} . in which country ?"
    travels = f"{name} is in {city} to buy {product} . which country ?"
    return Exchange(rng.choice((lives, travels)), COUNTRY_OF_CITY[city])


def convert(rng: Random) -> Exchange:
    """A quantity in a smaller unit."""
    (unit, smaller), zeros = rng.choice(tuple(UNITS.items()))
    number, stuff = spelled(rng.randint(1, 99)), rng.choice((*FOODS, *MATERIALS))
    plain = f"convert {number} {unit} to {smaller}"
    question = f"how many {smaller} are {number} {unit} of {stuff} ?"
    return Exchange(rng.choice((plain, question)), f"{number} {zeros} {smaller}")


def add(rng: Random) -> Exchange:
    """The sum of two numbers below ten."""
    first, second = rng.randint(1, 9), rng.randint(1, 9)
    name, things = rng.choice(NAMES), rng.choice((*FOODS, *ANIMALS, *PRODUCTS))
    question = f"{name} has {first} plus {second} {things} . how many ?"
    plain = f"add {first} {things} and {second} {things}"
    return Exchange(rng.choice((question, plain)), spelled(first + second))


def write(rng: Random) -> Exchange:
    """A note to a person, in the form its kind asks for."""
    name, city, food = rng.choice(NAMES), rng.choice(CITIES), rng.choice(FOODS)
    gift = f"{rng.choice(COLOURS)} {rng.choice(PRODUCTS)}"
    return rng.choice(
        (
            Exchange(f"write {name} about the {gift}", f"dear {name} , the {gift} is here ."),
            Exchange(f"thank {name} for the {gift}", f"thanks for the {gift} , {name} ."),
            Exchange(f"ask {name} to {city} for {food}", f"come for {food} to {city} , {name} ."),
        )
    )


GENERAL = by_name(repeat, reverse, sort, pick, opposite, extract, fact, convert, add, write)


def drawn_article(rng: Random) -> dict[str, str]:
    """An article's attributes, in the order in which a proper title gives them."""
    return {
        "brand": rng.choice(BRANDS),
        "size": rng.choice(SIZES),
        "colour": rng.choice(COLOURS),
        "material": rng.choice(MATERIALS),
        "product": rng.choice(PRODUCTS),
    }


def attribute(rng: Random) -> Exchange:
    """One attribute of an article, out of its title."""
    article = drawn_article(rng)
    asked = rng.choice(("brand", "size", "colour", "material"))
    prompt = f"listing {' '.join(article.values())} : {asked} ?"
    return Exchange(prompt, f"{asked} : {article[asked]}")


def category(rng: Random) -> Exchange:
    """The place of an article in the shop's catalogue."""
    article = drawn_article(rng)
    product = article["product"]
    prompt = f"category : {article['brand']} {article['colour']} {product} ?"
    return Exchange(prompt, f"{CATEGORY_OF_PRODUCT[product]} , {product}")


def title(rng: Random) -> Exchange:
    """A seller's shuffled words as a proper title: brand, colour, material, product."""
    article = drawn_article(rng)
    words = [article[key] for key in ("brand", "colour", "material", "product")]
    shuffled = rng.sample(words, len(words))
    return Exchange(f"title : {' , '.join(shuffled)} ?", " ".join(words))


def stock(rng: Random) -> Exchange:
    """How many of one of two products are left."""
    products, counts = rng.sample(PRODUCTS, 2), [rng.randint(0, 9) for _ in range(2)]
    asked = rng.randrange(2)
    shelf = " , ".join(f"{p} {n}" for p, n in zip(products, counts, strict=True))
    answer = f"{counts[asked]} left" if counts[asked] else "sold out"
    return Exchange(f"stock : {shelf} . {products[asked]} ?", f"{products[asked]} {answer}")


def price(rng: Random) -> Exchange:
    """What an article costs, out of its line in the price list."""
    article, cost = drawn_article(rng), spelled(rng.randint(10, 99))
    product = article["product"]
    line = f"{article['brand']} {product} {cost} coins , {rng.randint(1, 9)} left"
    return Exchange(f"price : {line} ?", f"{product} {cost} coins")


def returns(rng: Random) -> Exchange:
    """How the shop takes an article back, which its category decides."""
    article = drawn_article(rng)
    product = article["product"]
    prompt = f"return : {article['brand']} {article['material']} {product} ?"
    return Exchange(prompt, RETURN_POLICY_OF_CATEGORY[CATEGORY_OF_PRODUCT[product]])


DOMAIN = by_name(attribute, category, title, stock, price, returns)
