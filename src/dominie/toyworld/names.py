"""The names `toyworld:…`: what they ask for, and the file or folder that is made of one."""

from __future__ import annotations

import json
import shutil
import tempfile
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, NamedTuple
from urllib.parse import parse_qsl

from dominie.core.errors import InputError, nearest
from dominie.core.io import file_manifest, is_intact, write_checksummed
from dominie.toyworld.families import DOMAIN, GENERAL
from dominie.toyworld.toy_models import LAYERS, MODELS, WIDTH, save_model
from dominie.toyworld.unequal_families import LONG_GENERAL, SHORT_DOMAIN, TRAVEL

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
    rows: Iterator[Row], families: Mapping[str, Family], fraction: float, key: str
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


SCHEME = "toyworld:"


#: Worlds by the lengths of their answers: about equal ones, and long general beside short others.
WORLDS = ("equal", "unequal")


@dataclass(frozen=True, kw_only=True)
class DataFile:
    """A data name: the families it draws from, world by world, and how many rows by default."""

    families: Mapping[str, Mapping[str, Family]]
    rows: int


_GENERAL = {"equal": GENERAL, "unequal": LONG_GENERAL}
DATA: Mapping[str, DataFile] = {
    "corpus": DataFile(families=_GENERAL, rows=24_000),
    "general": DataFile(families=_GENERAL, rows=2_400),
    "domain": DataFile(families={"equal": DOMAIN, "unequal": SHORT_DOMAIN}, rows=1_800),
    "travel": DataFile(families={"unequal": TRAVEL}, rows=1_800),
}


@dataclass(frozen=True, kw_only=True)
class Request:
    """What a name asks for: rows, noise and world of data, width and layers of a model."""

    name: str
    thing: str
    rows: int = 0
    noise: float = 0.0
    lengths: str = WORLDS[0]
    width: int = WIDTH
    layers: int = LAYERS


def is_toyworld(path: object) -> bool:
    """Whether a recipe's path or model is a name of the toy world."""
    return isinstance(path, str) and path.startswith(SCHEME)


def parsed(name: str) -> Request:
    """What `name` asks for.

    Raises:
        InputError: no such name, no such option, or a value out of range.
    """
    thing, _, query = name.removeprefix(SCHEME).partition("?")
    known = (*DATA, *MODELS)
    if not is_toyworld(name) or thing not in known:
        near = nearest(thing, known)
        raise InputError(
            "no such name in the toy world",
            where=name,
            expected=", ".join(SCHEME + each for each in known),
            do=f"did you mean {SCHEME}{near}?" if near else None,
        )
    options = dict(parse_qsl(query, keep_blank_values=True))
    allowed = ("rows", "noise", "lengths") if thing in DATA else ("width", "layers")
    for option in options:
        if option not in allowed:
            near = nearest(option, allowed)
            raise InputError(
                f"unknown option {option!r}",
                where=name,
                expected=" and ".join((", ".join(allowed[:-1]), allowed[-1])),
                do=f"did you mean {near}?" if near else None,
            )
    if thing in MODELS:
        width = _count(name, "width", options.get("width", str(WIDTH)))
        if width % 32:
            raise InputError("width is not a multiple of 32", where=name, found=str(width))
        layers = _count(name, "layers", options.get("layers", str(LAYERS)))
        return Request(name=name, thing=thing, width=width, layers=layers)
    return Request(
        name=name,
        thing=thing,
        rows=_count(name, "rows", options.get("rows", str(DATA[thing].rows))),
        noise=_fraction(name, options.get("noise", "0")),
        lengths=_lengths(name, thing, options.get("lengths", WORLDS[0])),
    )


def materialise(name: str, folder: Path, *, seed: int = 0) -> Path:
    """Make what a name of the toy world asks for, or find it already made.

    Args:
        name: `toyworld:corpus`, `toyworld:general` or `toyworld:domain` for data, with the options
            `?rows=800&noise=0.3&lengths=unequal` (`noise`: the fraction of rows whose answer is
            wrong; `unequal`: general answers of 5 to 60 tokens and domain answers of 2 to 4, where
            there is also a second domain, `toyworld:travel`); `toyworld:teacher` or
            `toyworld:student` for an untrained model, with the options `?width=1024&layers=12`.
        folder: where to put it; made if it is not there.
        seed: of the draws and of the weights. The same seed gives the same bytes.

    Returns:
        The JSONL file, or the model's folder. It is either whole or not there.

    Raises:
        InputError: the name is unknown or asks for more than the world holds.
    """
    request = parsed(name)
    target = folder / _file_name(request, seed)
    manifest = target.with_name(f"{target.name}.manifest.json")
    if target.exists():
        if not manifest.exists() or is_intact(folder, manifest):
            return target
        shutil.rmtree(target) if target.is_dir() else target.unlink()
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".toyworld-", dir=folder) as scratch:
        made = Path(scratch) / target.name
        if request.thing in DATA:
            made.write_text(data_text(request, seed), encoding="utf-8")
        else:
            save_model(request.thing, made, seed, width=request.width, layers=request.layers)
        files = sorted(made.rglob("*")) if made.is_dir() else [made]
        sealed = Path(scratch) / manifest.name
        write_checksummed(sealed, {"files": file_manifest(made.parent, files)})
        sealed.replace(manifest)  # of whoever makes it: the bytes are the same
        try:
            made.replace(target)
        except OSError:  # another process was first; what it made is the same
            if not target.exists():
                raise
            shutil.rmtree(made, ignore_errors=True)
    return target


def data_text(request: Request, seed: int) -> str:
    """The JSON lines of a data file."""
    families = DATA[request.thing].families[request.lengths]
    key = f"{seed}:{request.thing}" + _unusual(request)
    drawn = drawn_rows(families, Random(key))
    rows = with_noise(drawn, families, request.noise, key=f"{key}:noise")
    text = ""
    for row in first_rows(rows, request.rows, where=request.name):
        question = {"role": "user", "content": row.prompt}
        answer = {"role": "assistant", "content": row.answer}
        text += json.dumps({"messages": [question, answer], "family": row.family}) + "\n"
    return text


def _file_name(request: Request, seed: int) -> str:
    if request.thing in MODELS:
        usual = (request.width, request.layers) == (WIDTH, LAYERS)
        size = "" if usual else f"-{request.width}x{request.layers}"
        return f"{request.thing}{size}-seed{seed}"
    noise = f"-noise{request.noise:g}" if request.noise else ""
    return f"{request.thing}{_unusual(request)}-{request.rows}{noise}-seed{seed}.jsonl"


def _unusual(request: Request) -> str:
    return "" if request.lengths == WORLDS[0] else f"-{request.lengths}"


def _count(name: str, option: str, text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise InputError(f"{option} is not a whole number above zero", where=name, found=repr(text))
    return int(text)


def _fraction(name: str, text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0.0 <= value <= 1.0:
        raise InputError("noise is not a fraction from 0 to 1", where=name, found=repr(text))
    return value


def _lengths(name: str, thing: str, text: str) -> str:
    known = tuple(DATA[thing].families)
    if text not in known:
        raise InputError(
            "no such lengths of answers",
            where=name,
            found=repr(text),
            expected=" or ".join(known),
            do=f"write {SCHEME}{thing}?lengths={known[-1]}",
        )
    return text
