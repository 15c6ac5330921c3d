"""Shell completion beyond commands and options: recipes and their keys, runs and their models."""

from __future__ import annotations

import contextlib
import glob
import io
import itertools
import json
import os
import re
import shlex
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import typer

from dominie.core.run_reader import found_run, read_results, runs_in

#: What may stand on a command line without quotes.
_PLAIN = re.compile(r"[\w.+/-]+")


def offered_keys(tree: Mapping[str, Any], incomplete: str) -> Iterator[str]:
    """What may follow: parts of keys up to the next dot, whole keys, and values of a whole one.

    Args:
        tree: the recipe as its file has it, whose names stand in for those of the schema.
        incomplete: what has been typed.
    """
    values = _values(tree)
    key, equals, _ = incomplete.partition("=")
    if equals:
        yield from (f"{key}={value}" for value in values.get(key, ()))
        return
    begun = incomplete
    while True:
        at = len(begun)
        found = [key for key in values if key.startswith(begun)]
        steps = {re.match(r"[^.]*\.?", key[at:])[0] for key in found}  # type: ignore[index]
        if len(steps) != 1 or not (step := steps.pop()).endswith("."):
            break
        begun += step  # a single part is no choice: what comes after it is
    ends = {key[: at + len(step)] for key in found for step in [_step(key[at:])]}
    yield from (end if end.endswith(".") else f"{end}=" for end in ends)
    if len(ends) == 1:  # with a second word to choose, the shell puts no space after the `=`
        yield from (f"{key}={value}" for key in found for value in values[key])


def _step(text: str) -> str:
    """A part of a key with the dot that ends it, where one does."""
    head, dot, _ = text.partition(".")
    return head + dot


def _values(tree: Mapping[str, Any]) -> dict[str, list[str]]:
    """The recipe's keys, each with the values to offer for it."""
    table = json.loads(
        resources.files("dominie.cli").joinpath("recipe_keys.json").read_text("utf-8")
    )
    found: dict[str, list[str]] = {}
    for pattern, known in table.items():
        for parts in _named(pattern.split("."), tree):
            if _is_of_another_kind(parts, tree):
                continue
            present = _text(_present(tree, parts))
            found[".".join(parts)] = list(dict.fromkeys([*([present] if present else ()), *known]))
    return found


def _named(pattern: Sequence[str], tree: Any) -> Iterator[list[str]]:
    """A pattern's paths, with the recipe's own names in place of `*`."""
    if not pattern:
        yield []
        return
    inner = tree if isinstance(tree, Mapping) else {}
    for name in map(str, inner) if pattern[0] == "*" else [pattern[0]]:
        for rest in _named(pattern[1:], inner.get(name)):
            yield [name, *rest]


def _is_of_another_kind(parts: Sequence[str], tree: Mapping[str, Any]) -> bool:
    """Whether a stage's key belongs to a kind of stage that this one is not."""
    if parts[0] != "stages" or len(parts) < 3:
        return False
    stage = tree["stages"][parts[1]]
    own = {"merge", "upcycle"} & set(stage) if isinstance(stage, Mapping) else set()
    if own:
        return parts[2] not in {*own, "train"}
    return parts[2] in ("merge", "upcycle")


def _present(tree: Any, parts: Sequence[str]) -> Any:
    """The value that a recipe gives a key; a stage has the recipe's `train`."""
    node = tree
    for part in parts:
        node = node.get(part) if isinstance(node, Mapping) else None
    if node is None and parts[0] == "stages" and len(parts) > 3 and parts[2] == "train":
        return _present(tree, parts[2:])
    return node


def _text(value: Any) -> str | None:
    """A value as it is typed; None of one that needs quotes."""
    said = str(value).lower() if isinstance(value, bool) else str(value)
    plain = isinstance(value, bool | int | float | str) and _PLAIN.fullmatch(said)
    return said if plain else None


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
                yield read_results(path, [])
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
