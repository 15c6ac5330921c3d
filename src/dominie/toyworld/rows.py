"""Rows of a data file: conversations drawn without end, never the same prompt twice."""

from __future__ import annotations

from itertools import islice
from random import Random
from typing import TYPE_CHECKING, NamedTuple

from dominie.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from dominie.toyworld.families import Family

# So many draws without a new prompt mean that a family is exhausted.
_PATIENCE = 1_000


class Row(NamedTuple):
    """One exchange and the skill family it practises."""

    prompt: str
    answer: str
    family: str


def drawn_rows(families: Mapping[str, Family], rng: Random) -> Iterator[Row]:
    """Rows of all families in equal parts, until one of them has no new prompt left.

    A longer file starts with all rows of a shorter one.
    """
    seen: set[str] = set()
    while True:
        name = rng.choice(tuple(families))
        exchanges = (families[name](rng) for _ in range(_PATIENCE))
        fresh = next((each for each in exchanges if each.prompt not in seen), None)
        if fresh is None:
            return
        seen.add(fresh.prompt)
        yield Row(*fresh, name)


def with_noise(
    rows: Iterator[Row],
    families: Mapping[str, Family],
    fraction: float,
    key: str,
) -> Iterator[Row]:
    """The rows with a wrong answer in `fraction` of them: that of another question of the family.

    Whether a row is hit, and by which answer, depends on `key` and its prompt alone; so the rows
    that are wrong at a small fraction are also wrong, in the same way, at a larger one.
    """
    for row in rows:
        rng = Random(f"{key}:{row.prompt}")
        if rng.random() >= fraction:
            yield row
            continue
        wrong = row.answer
        while wrong == row.answer:
            wrong = families[row.family](rng).answer
        yield row._replace(answer=wrong)


def first_rows(rows: Iterator[Row], count: int, where: str) -> list[Row]:
    """The first `count` rows.

    Raises:
        InputError: the world has fewer different prompts than that.
    """
    found = list(islice(rows, count))
    if len(found) < count:
        raise InputError(
            "the toy world has not that many different prompts",
            where=where,
            found=f"rows={count}",
            do=f"ask for at most {len(found) // 100 * 100} rows",
        )
    return found
