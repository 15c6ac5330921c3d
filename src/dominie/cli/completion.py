"""What the shell completes beyond verbs and options: recipes and their keys, runs and their models.

Every function here is asked while a person waits for Tab, so that none imports what is heavy, and
one that fails offers nothing.
"""

from __future__ import annotations

import contextlib
import glob
import io
import itertools
import json
import os
import re
import shlex
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import typer

from dominie.cli.recipe_keys import offered_keys
from dominie.files.run_folders import found_run, runs_in

#: How many files are looked at for being recipes: a home folder holds more than anyone waits for.
_LOOKED_AT = 300
_RECIPE_BEGINS = re.compile(rb"^(stages|evaluate)\s*:", re.M)

Completer = Callable[[typer.Context, str], list[str]]


def _quietly(offer: Callable[[typer.Context, str], Iterable[str]]) -> Completer:
    """A completer that offers nothing where it fails: a message would land in the command line."""

    def offered(ctx: typer.Context, incomplete: str) -> list[str]:
        try:
            return sorted(set(offer(ctx, incomplete)))
        except Exception:  # whatever lies in a person's folders
            return []

    return offered


@_quietly
def recipes(_: typer.Context, incomplete: str) -> Iterator[str]:
    """Recipe files, and folders that hold a `recipe.yaml`."""
    above, _slash, begun = incomplete.rpartition("/")
    start = f"{above}/" if above or incomplete.startswith("/") else ""
    names = glob.escape(begun) + "*"
    shapes = (f"{names}.y*ml", f"{names}/recipe.yaml", f"{names}/*.y*ml", f"{names}/*/*.y*ml")
    found = (path for shape in shapes for path in Path(start or ".").glob(shape))
    for path in itertools.islice(found, _LOOKED_AT):
        if any(part.startswith(".") and part != ".." for part in path.parts):
            continue
        if _RECIPE_BEGINS.search(path.read_bytes()):
            dot = "./" if start == "./" else ""  # which a path does not keep
            folder = f"{dot}{path.parent}"
            is_told_by_it = path.name == "recipe.yaml" and path.parent != Path()
            yield folder if is_told_by_it and folder.startswith(incomplete) else f"{dot}{path}"


@_quietly
def overrides(ctx: typer.Context, incomplete: str) -> Iterator[str]:
    """Keys of the recipe that stands before, a part at a time, and their values."""
    yield from offered_keys(_recipe(ctx), incomplete)


@_quietly
def varied(ctx: typer.Context, incomplete: str) -> Iterator[str]:
    """Keys to sweep over; the values are for a person to say."""
    yield from (key for key in offered_keys(_recipe(ctx), incomplete) if key[-1] in ".=")


@_quietly
def scored(ctx: typer.Context, incomplete: str) -> Iterator[str]:
    """Names under `evaluate.models`, separated by commas."""
    yield from _listed((_recipe(ctx).get("evaluate") or {}).get("models") or {}, incomplete)


@_quietly
def run_names(ctx: typer.Context, incomplete: str) -> Iterator[str]:
    """Runs by their names, or by their folders where a folder has been begun."""
    yield from _runs(_runs_folder(ctx), incomplete)


@_quietly
def models(ctx: typer.Context, incomplete: str) -> Iterator[str]:
    """`RUN`, and `RUN:NAME,NAME` once a run is told."""
    runs = _runs_folder(ctx)
    word, colon, begun = incomplete.rpartition(":")
    if colon:
        there = _models_of(found_run(Path(word), runs))
        yield from (f"{word}:{names}" for names in _listed(there, begun))
        return
    told = list(_runs(runs, incomplete))
    yield from told
    if len(told) == 1:  # else Tab would end the word, and the colon come too late
        there = _models_of(found_run(Path(told[0]), runs))
        yield from (f"{told[0]}:{name}" for name in there)


@_quietly
def tasks(ctx: typer.Context, _: str) -> Iterator[str]:
    """Tasks of the runs that stand before."""
    for results in _results(ctx):
        yield from itertools.chain.from_iterable(results.values())


@_quietly
def compared(ctx: typer.Context, _: str) -> Iterator[str]:
    """Models of the runs that stand before."""
    for results in _results(ctx):
        yield from results


def _runs_folder(ctx: typer.Context) -> Path:
    return Path(ctx.params.get("runs") or "runs")


def _runs(runs: Path, incomplete: str) -> Iterator[str]:
    names = runs_in(runs)
    by_name = [name for name in names if name.startswith(incomplete)]
    by_folder = [f"{runs}/{name}" for name in names if f"{runs}/{name}".startswith(incomplete)]
    yield from by_name or by_folder


def _models_of(run: Path) -> list[str]:
    """The stages that a run has finished, and its recipe's names for models."""
    made = [path.parent.name for path in run.glob("*/model") if path.is_dir()]
    tree = _parsed(run / "recipe.yaml")
    return [*made, *((tree.get("evaluate") or {}).get("models") or {}), *(tree.get("models") or {})]


def _listed(names: Iterable[str], incomplete: str) -> Iterator[str]:
    """The names that may come next in a list with commas, after those it has."""
    before, comma, _ = incomplete.rpartition(",")
    yield from (f"{before}{comma}{name}" for name in names if name not in before.split(","))


def _results(ctx: typer.Context) -> Iterator[dict[str, Any]]:
    for word in ctx.params.get("wanted") or ctx.args:
        for path in (Path(word), _runs_folder(ctx) / word):
            if (path / "results.json").is_file():
                yield json.loads((path / "results.json").read_text("utf-8"))
                break


def _recipe(ctx: typer.Context) -> dict[str, Any]:
    """The recipe that has been typed, as it is written; empty where there is none."""
    # While an option waits for its value, what stands before it has no name yet.
    path = Path(ctx.params.get("recipe") or next(iter(ctx.args), ""))
    return _parsed(path / "recipe.yaml" if path.is_dir() else path)


def _parsed(path: Path) -> dict[str, Any]:
    from ruamel.yaml import YAML

    tree = YAML(typ="safe", pure=True).load(path.read_text("utf-8")) if path.is_file() else None
    return tree if isinstance(tree, dict) else {}


@contextlib.contextmanager
def whole_words() -> Iterator[None]:
    """Within, completion for bash sees whole words, and what it prints is for bash's parts of them.

    To bash a `:` or `=` ends a word, so that `mine:align` comes as three, and only what follows the
    last of them is replaced.
    """
    if os.environ.get("_DOMINIE_COMPLETE") != "complete_bash":
        yield
        return
    text, place = os.environ.get("COMP_WORDS", ""), int(os.environ.get("COMP_CWORD", "0"))
    try:
        parts = shlex.split(text)
    except ValueError:  # a quote that is not closed yet
        parts = text.split()
    words: list[str] = []
    where: list[int] = []  # the word that each part went to
    for number, part in enumerate(parts):
        glued = number > 1 and (
            bool(re.fullmatch("[:=]+", part)) or bool(re.fullmatch("[:=]+", parts[number - 1]))
        )
        if glued and part:
            words[-1] += part
        else:
            words.append(part)
        where.append(len(words) - 1)
    current = where[place] if place < len(parts) else len(words)
    whole = words[current] if current < len(words) else ""
    os.environ["COMP_WORDS"] = shlex.join(words)
    os.environ["COMP_CWORD"] = str(current)
    there = len(re.match(r".*[:=]|", whole)[0]) if place < len(parts) else 0  # type: ignore[index]
    printed = io.StringIO()
    try:
        with contextlib.redirect_stdout(printed):
            yield
    finally:
        for line in filter(None, printed.getvalue().splitlines()):
            print(line[there:])
