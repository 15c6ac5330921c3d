"""The words of the toy world and the few facts that hold in it.

Every word is one token and every digit is one token, so that the models can be tiny. The words of
the shop stand among `NOUNS` too: general conversations list, copy and reverse them, and a domain
expert does not meet them for the first time.
"""

from __future__ import annotations


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


DIGITS = tuple("0123456789")

NAMES = _words(
    "anna ben clara david emma felix greta hugo ida jonas karla leo mara nils olga paul rosa simon "
    "tilda victor"
)
FOODS = _words("tea milk bread rice soup cheese honey salt corn jam cake juice")
ANIMALS = _words("cat dog fox cow horse sheep duck frog goat owl bear mouse")
PLACES = _words("river bridge tower garden forest island market station harbour castle")
SIZES = _words("small medium large")
COLOURS = _words("red blue green black white yellow brown grey pink orange")
MATERIALS = _words("cotton wool silk leather steel glass wood paper linen copper")
BRANDS = _words("nova apex orion lumen vega atlas zenith")

COUNTRY_OF_CITY = {
    "paris": "france",
    "lyon": "france",
    "rome": "italy",
    "milan": "italy",
    "madrid": "spain",
    "seville": "spain",
    "berlin": "germany",
    "munich": "germany",
    "delhi": "india",
    "mumbai": "india",
    "tokyo": "japan",
    "kyoto": "japan",
    "lima": "peru",
    "cusco": "peru",
    "cairo": "egypt",
    "giza": "egypt",
}
CITIES = tuple(COUNTRY_OF_CITY)

_OPPOSITES = (
    "hot cold",
    "big little",
    "fast slow",
    "new old",
    "open closed",
    "full empty",
    "early late",
    "light dark",
    "happy sad",
    "rich poor",
    "loud quiet",
    "near far",
)
OPPOSITE_OF = {
    word: other for pair in map(str.split, _OPPOSITES) for word, other in (pair, reversed(pair))
}

CATEGORY_OF_PRODUCT = {
    "shirt": "clothing",
    "coat": "clothing",
    "scarf": "clothing",
    "kettle": "kitchen",
    "pan": "kitchen",
    "cup": "kitchen",
    "lamp": "home",
    "chair": "home",
    "rug": "home",
    "phone": "electronics",
    "radio": "electronics",
    "camera": "electronics",
    "ball": "sports",
    "racket": "sports",
    "tent": "sports",
}
PRODUCTS = tuple(CATEGORY_OF_PRODUCT)
CATEGORIES = tuple(dict.fromkeys(CATEGORY_OF_PRODUCT.values()))

# What the shop says when an article of the category is sent back.
RETURN_POLICY_OF_CATEGORY = {
    "clothing": "free for 9 0 days",
    "kitchen": "unused for 3 0 days",
    "home": "by van for 3 0 days",
    "electronics": "sealed for 1 4 days",
    "sports": "unused for 6 0 days",
}

# What a listing is made of, beside digits and the nouns above. As plain nouns they stand in the
# general lists, too.
SHOP_TERMS = _words(
    "shop title price stock category return colour material brand size policy coins days left "
    "sold out free unused sealed by van listing each"
)

NOUNS = (
    *FOODS,
    *ANIMALS,
    *PLACES,
    *COLOURS,
    *MATERIALS,
    *BRANDS,
    *SIZES,
    *PRODUCTS,
    *CATEGORIES,
    *SHOP_TERMS,
)

# Smaller units of each unit, as the zeros that a conversion appends.
UNITS = {
    ("metres", "centimetres"): "0 0",
    ("centimetres", "millimetres"): "0",
    ("kilometres", "metres"): "0 0 0",
    ("kilograms", "grams"): "0 0 0",
}

GLUE = _words(
    "? . , : about add and are ask backwards buys centimetres colour come convert country dear "
    "final first for grams has here how in is kilograms kilometres lives many metres "
    "middle millimetres of opposite order plus repeat reverse say sort thank thanks the to what "
    "which where who write buy"
)

WORDS = tuple(
    dict.fromkeys(
        (
            *DIGITS,
            *GLUE,
            *NAMES,
            *NOUNS,
            *CITIES,
            *COUNTRY_OF_CITY.values(),
            *OPPOSITE_OF,
        )
    )
)
