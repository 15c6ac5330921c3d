"""Prints docs/recipe.md from the typed objects of a recipe; `--write` puts it there."""

from __future__ import annotations

import dataclasses
import inspect
import re
import textwrap
import types
import typing
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

from generated import say_or_write

from dominie.recipe import Recipe, StageConfig, stage_kinds
from dominie.recipe.train_arguments import DERIVED
from dominie.training.settings import TrainSettings

PAGE = Path(__file__).parent / "recipe.md"

_BEFORE = """# Recipe reference

`python docs/recipe_reference.py --write` made this page of the objects that a recipe is read into,
so what stands here is what is accepted: a key that is not here is refused, with the nearest one
that is. `NAME` and `SOURCE` are names of your own. [Your own data](own-data.md) and the commented
recipes in `recipes/` show whole ones.

**Shorthands.** A bare value stands for a mapping where one key matters most: `models.NAME: PATH`,
`data.NAME: PATH`, `stages.NAME.data.SOURCE: SHARE`, a loss term's `WEIGHT`, and `cache: true`.

**Defaults of every stage** stand under the recipe's own `train`; a stage's `train` replaces single
keys of it.

**On the command line** any key can be set by its path:
`dominie run mine.yaml stages.align.train.epochs=1`.

**Paths** begin at the recipe's folder. A student or teacher is the name of a stage, else a name
under `models`, else a folder, else an id on the Hugging Face hub.
"""

_TITLES = {
    "Recipe": "The recipe",
    "Source": "A source",
    "Model": "A model",
    "ServedModel": "A model behind a server",
    "TrainStage": "A stage that trains",
    "MixedSource": "A source within a stage",
    "PrivilegedTeacher": "A teacher that reads the answer",
    "LossTerms": "The loss",
    "NextToken": "Loss: next token",
    "Prediction": "Loss: prediction",
    "Spans": "Loss: spans",
    "Attention": "Loss: attention",
    "Router": "Loss: router",
    "CacheSettings": "The teacher cache",
    "TrainSettings": "Training",
    "Balance": "Balance of sources",
    "StopAt": "What ends a stage early",
    "Lora": "Adapters",
    "MergeStage": "A stage that merges",
    "Merge": "What is merged",
    "UpcycleStage": "A stage that upcycles",
    "Upcycle": "What is upcycled",
    "PruneStage": "A stage that prunes",
    "Prune": "What is pruned",
    "AnswersStage": "A stage that writes answers",
    "Answers": "What is answered",
    "Keep": "Which answers are kept",
    "Evaluation": "Evaluation",
    "Task": "A task",
    "Harness": "Tasks of lm-evaluation-harness",
    "RolloutSettings": "Rollouts",
    "RolloutServer": "A server of rollouts",
    "MtBench": "MT-Bench",
    "AlpacaEval": "AlpacaEval",
    "Judge": "A judge",
    "Endpoint": "An endpoint",
    "Price": "A price",
    "Budget": "A budget",
}
_NAMED = {"data": "SOURCE", "models": "NAME"}
_PLAIN = {str: "text", int: "whole number", float: "number", bool: "true or false", Any: "anything"}
_DEFAULTS = {("Recipe", "name"): "the name of the file, or of the folder of a `recipe.yaml`"}
_HIDDEN = {("Source", "name"), ("TrainSettings", "arguments")}


def page() -> str:
    """The page of today's objects."""
    places = _places()
    sections = [_section(kind, found) for kind, found in places.items()]
    return "\n".join([_BEFORE, *sections, _derived()])


def undocumented() -> list[str]:
    """Keys of which no docstring says what they mean."""
    return [
        f"{kind.__name__}.{field.name}"
        for kind in _places()
        for field in _fields(kind)
        if field.name not in _meanings(kind)
    ]


def settings() -> list[type]:
    """The classes that a recipe is made of, those they inherit from among them."""
    own = (base for kind in _places() for base in kind.__mro__)
    return list(dict.fromkeys(base for base in own if base.__module__.startswith("dominie")))


def _places() -> dict[type, list[str]]:
    """Every object of a recipe and the paths it stands at, each after what it stands in."""
    places: dict[type, list[str]] = {}

    def visit(kind: type, path: str) -> None:
        known = places.setdefault(kind, [])
        known.append(path)
        if len(known) > 1:
            return
        hints = typing.get_type_hints(kind)
        for field in _fields(kind):
            here = f"{path}.{field.name}".removeprefix(".")
            for inner, tail in _inside(hints[field.name], field.name):
                visit(inner, here + tail)

    visit(Recipe, "")
    return places


def _inside(hint: Any, name: str) -> list[tuple[type, str]]:
    """The objects within a type, and what their path has beyond it."""
    if hint is StageConfig:
        return [(kind, "") for kind in stage_kinds().values()]
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        return [(hint, "")]
    if typing.get_origin(hint) is Literal:
        return []
    arguments = typing.get_args(hint)
    if typing.get_origin(hint) is dict:
        key = _NAMED.get(name, "NAME")
        return [(inner, f".{key}{tail}") for inner, tail in _inside(arguments[1], name)]
    return [found for each in arguments for found in _inside(each, name)]


def _fields(kind: type) -> list[dataclasses.Field[Any]]:
    return [f for f in dataclasses.fields(kind) if (kind.__name__, f.name) not in _HIDDEN]


def _section(kind: type, paths: list[str]) -> str:
    summary = " ".join(inspect.getdoc(kind).split("\n\n")[0].split())  # type: ignore[union-attr]
    lines = [f"## {_TITLES[kind.__name__]}", ""]
    where = [f"`{path}`" for path in paths if path]
    lines += [f"{', '.join(where)}: {summary}" if where else summary, ""]
    rest = inspect.getdoc(kind).split("\n\n")[1:]  # type: ignore[union-attr]
    prose = [part for part in rest if not re.match(r"(Attributes|Args|Raises):", part)]
    lines += [f"{' '.join(part.split())}\n" for part in prose]
    lines += ["| key | value | default | meaning |", "|---|---|---|---|"]
    hints, meanings = typing.get_type_hints(kind), _meanings(kind)
    for field in _fields(kind):
        cells = (
            f"`{field.name}`",
            _alternatives(field.metadata.get("values", ())) or _type(hints[field.name]),
            _DEFAULTS.get((kind.__name__, field.name)) or _default(field),
            _cell(meanings.get(field.name, "")),
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, ""])


def _meanings(kind: type) -> dict[str, str]:
    """What the docstrings of a class and its bases say of each field."""
    found: dict[str, str] = {}
    for base in reversed(kind.__mro__):
        doc = inspect.cleandoc(base.__doc__ or "")
        for part in re.split(r"\n\n", doc):
            if not re.match(r"(Attributes|Args):\n", part):
                continue
            body = textwrap.dedent(part.split("\n", 1)[1])
            for entry in re.split(r"\n(?=\S)", body):
                name, _, meaning = entry.partition(":")
                found[name.strip()] = " ".join(meaning.split())
    return found


def _type(hint: Any) -> str:
    if hint in _PLAIN:
        return _PLAIN[hint]
    if hint is StageConfig:
        return " or ".join(_type(kind) for kind in stage_kinds().values())
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        title = _TITLES[hint.__name__]
        return f"[{title.lower()}](#{_anchor(title)})"
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return _alternatives(arguments)
    if origin is dict:
        return f"names, each with {_type(arguments[1])}" if arguments[1] is not Any else "mapping"
    if origin is list:
        return f"list of {_type(arguments[0])}"
    if origin is typing.Annotated:
        return _type(arguments[0])
    if origin in (typing.Union, types.UnionType):
        return " or ".join(dict.fromkeys(_type(a) for a in arguments if a is not type(None)))
    raise TypeError(f"no words for {hint}")


def _alternatives(values: Iterable[Any]) -> str:
    return " or ".join(f"`{value}`" for value in values)


def _default(field: dataclasses.Field[Any]) -> str:
    if field.default is not dataclasses.MISSING:
        value = field.default
    elif field.default_factory is not dataclasses.MISSING:
        return "none" if field.default_factory in (dict, list) else "its own defaults"
    else:
        return "required"
    if value is None:
        return "–"
    return f"`{str(value).lower() if isinstance(value, bool) else value}`"


def _derived() -> str:
    """Fields of transformers' that a recipe may use, and those it may not."""
    ours = {field.name for field in dataclasses.fields(TrainSettings)}
    rows = [f"| `{name}` | {meaning} |" for name, meaning in DERIVED.items() if name not in ours]
    return "\n".join(
        [
            "## Fields of transformers",
            "",
            "Any other field of `transformers.TrainingArguments` may stand under `train` as it is: "
            "`optim`, `weight_decay`, `warmup_ratio`, `lr_scheduler_type`, `report_to`, `fsdp`, "
            "`deepspeed` … Those that follow from other keys are refused, and it is said which:",
            "",
            "| field | follows from |",
            "|---|---|",
            *rows,
            "",
        ]
    )


def _anchor(title: str) -> str:
    return re.sub(r"[^\w]+", "-", title.lower()).strip("-")


def _cell(text: str) -> str:
    return re.sub(r"\bNone\b", "none", text.replace("|", "\\|"))


if __name__ == "__main__":
    say_or_write(PAGE, page())
