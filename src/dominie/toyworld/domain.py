"""The shop: the families of the domain, written in the shop's own terse form."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dominie.toyworld.families import Exchange, spelled
from dominie.toyworld.lexicon import (
    BRANDS,
    CATEGORY_OF_PRODUCT,
    COLOURS,
    MATERIALS,
    PRODUCTS,
    RETURN_POLICY_OF_CATEGORY,
    SIZES,
)

if TYPE_CHECKING:
    from collections.abc import Mapping
    from random import Random

    from dominie.toyworld.families import Family


def _article(rng: Random) -> dict[str, str]:
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
    article = _article(rng)
    asked = rng.choice(("brand", "size", "colour", "material"))
    return Exchange(
        f"listing {' '.join(article.values())} : {asked} ?", f"{asked} : {article[asked]}"
    )


def category(rng: Random) -> Exchange:
    """The place of an article in the shop's catalogue."""
    article = _article(rng)
    product = article["product"]
    return Exchange(
        f"category : {article['brand']} {article['colour']} {product} ?",
        f"{CATEGORY_OF_PRODUCT[product]} , {product}",
    )


def title(rng: Random) -> Exchange:
    """A seller's shuffled words as a proper title: brand, colour, material, product."""
    article = _article(rng)
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
    article, cost = _article(rng), spelled(rng.randint(10, 99))
    product = article["product"]
    line = f"{article['brand']} {product} {cost} coins , {rng.randint(1, 9)} left"
    return Exchange(f"price : {line} ?", f"{product} {cost} coins")


def returns(rng: Random) -> Exchange:
    """How the shop takes an article back, which its category decides."""
    article = _article(rng)
    product = article["product"]
    return Exchange(
        f"return : {article['brand']} {article['material']} {product} ?",
        RETURN_POLICY_OF_CATEGORY[CATEGORY_OF_PRODUCT[product]],
    )


DOMAIN: Mapping[str, Family] = {
    family.__name__: family for family in (attribute, category, title, stock, price, returns)
}
