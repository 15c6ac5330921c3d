"""Reads a recipe: applies overrides, writes out shorthands and refuses unknown keys."""

from __future__ import annotations

import dataclasses
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pydantic
from ruamel.yaml import YAML

from dominie.core.errors import InputError
from dominie.core.references import Kind, rewritten
from dominie.data.data_files import exists, expanded
from dominie.data.sources import is_local
from dominie.generation.endpoint import Endpoint
from dominie.recipe.messages import (
    describe_value,
    first_problem,
    known_keys,
    unknown_key,
)
from dominie.recipe.schema import Recipe
from dominie.recipe.stage_config import stage_kinds
from dominie.recipe.train_arguments import OUR_TRAIN_KEYS, check_train
from dominie.recipe.validate import check_names
from dominie.recipe.yaml_text import check_tree, parsed_yaml, read_text, without_aliases

#: Paths at which a bare value stands for a mapping, and the key that the value is for.
_SHORTHANDS = (
    (("models", "*"), "path"),
    (("data", "*"), "path"),
    (("stages", "*", "data", "*"), "share"),
    (("stages", "*", "cache"), "enabled"),
    (("train", "balance"), "by"),
    (("stages", "*", "train", "balance"), "by"),
    (("stages", "*", "loss", "*"), "weight"),
    (("stages", "*", "data", "*", "loss", "*"), "weight"),
)


def load_recipe(path: Path | str, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe, apply `a.b.c=value` overrides and check all that needs no loading.

    A folder stands for the `recipe.yaml` in it.
    Paths of models and data that exist relative to the recipe's folder become absolute.

    Raises:
        InputError: the file is missing or not YAML, a key is unknown, a value has the wrong type,
        or a stage, source
            or model is named that does not exist.
    """
    path = Path(path)
    if (inside := path / "recipe.yaml").is_file():  # a folder that `init` or a run has made
        path = inside
    tree = parsed_yaml(read_text(path), where=str(path))
    if not isinstance(tree, dict):
        raise InputError(
            "not a recipe",
            where=str(path),
            expected="a mapping of name, data and stages",
            found=describe_value(tree),
        )
    # Every folder's recipe.yaml is called that: a run by this name would be any of them.
    tree.setdefault("name", path.resolve().parent.name if path.stem == "recipe" else path.stem)
    return _recipe(tree, overrides, where=str(path), base=path.parent)


def recipe_of(tree: Mapping[str, Any], overrides: Sequence[str] = ()) -> Recipe:
    """Read the recipe that a mapping holds, as `load_recipe` does from a file in this folder.

    Raises:
        InputError: as `load_recipe`, and for a mapping without a name.
    """
    if not isinstance(tree.get("name"), str):
        raise InputError("the recipe has no name", where="recipe", expected="name: a text")
    check_tree(dict(tree), where="recipe")
    return _recipe(without_aliases(dict(tree)), overrides, where="recipe", base=Path())


def _recipe(tree: dict[str, Any], overrides: Sequence[str], *, where: str, base: Path) -> Recipe:
    written = without_aliases(tree)
    for override in overrides:
        _apply_override(tree, override)
    _write_out_shorthands(tree)
    _name_judges(tree)
    _merge_train(tree)
    _name_sources(tree)
    try:
        # As JSON, because strict validation takes no mapping for an object in Python.
        parsed = pydantic.TypeAdapter(Recipe).validate_json(json.dumps(tree, default=str))
    except pydantic.ValidationError as error:
        raise first_problem(error, tree, written, where=where) from None
    recipe = _with_absolute_paths(parsed, base)
    check_names(recipe, where=where)
    stages = {name: stage.resolved(recipe) for name, stage in recipe.stages.items()}
    return dataclasses.replace(recipe, stages=stages)


def _with_absolute_paths(recipe: Recipe, base: Path) -> Recipe:
    """Make what exists relative to the recipe's folder absolute; anything else keeps its name.

    A data file that does not exist is looked for in the recipe's folder, and an output need not
    exist yet.
    """

    def absolute(kind: Kind, text: str) -> str:
        is_name = kind == "model" and (text in recipe.stages or text in recipe.models)
        if kind == "source" or is_name or not text.strip() or text.startswith("toyworld:"):
            return text
        path = expanded(text)
        if kind == "output":
            return str((base / path).absolute())
        if exists(base / path):
            if kind == "data":  # a link keeps its name: the hub's cache has files without suffixes
                return str((base / path).parent.resolve() / path.name)
            return str((base / path).resolve())
        missing = kind == "data" and is_local(text) and not exists(path)
        return str((base / path).absolute()) if missing else text

    return rewritten(recipe, absolute)


def dump_recipe(recipe: Recipe) -> str:
    """Write the resolved recipe as YAML, from which `load_recipe` reads an equal one."""
    tree = _without_none(dataclasses.asdict(recipe))
    for source in tree["data"].values():
        del source["name"]
    for part in (tree, *(stage for stage in tree["stages"].values() if "train" in stage)):
        part["train"].update(part["train"].pop("arguments", {}))
    yaml = YAML(typ="safe", pure=True)
    yaml.default_flow_style = False
    yaml.sort_base_mapping_type_on_output = False  # type: ignore[assignment]
    out = io.StringIO()
    yaml.dump(tree, out)
    return out.getvalue()


def _apply_override(tree: dict[str, Any], override: str) -> None:
    dotted, equals, text = override.partition("=")
    if not equals or not all(dotted.split(".")):
        raise InputError(
            "not an override",
            where=dotted if equals else override,
            expected="a.b.c=value, as in train.seed=1",
        )
    keys = dotted.split(".")
    node: dict[str, Any] = tree
    for depth, key in enumerate(keys[:-1], start=1):
        child = node.setdefault(key, {})
        if not isinstance(child, dict):
            meaning = _shorthand_key(keys[:depth])
            if meaning is None:
                raise InputError(
                    "not a mapping",
                    where=".".join(keys[:depth]),
                    found=describe_value(child),
                    do=f"set {dotted} whole",
                )
            child = node[key] = {meaning: child}
        node = child
    node[keys[-1]] = parsed_yaml(text, where=dotted)  # without the value, which may be secret


def _shorthand_key(path: Sequence[str]) -> str | None:
    for shape, key in _SHORTHANDS:
        if len(shape) == len(path) and all(s in ("*", p) for s, p in zip(shape, path, strict=True)):
            return key
    return None


def _write_out_shorthands(tree: Any, path: tuple[str, ...] = ()) -> None:
    for key, value in tree.items():
        here = (*path, str(key))
        if isinstance(value, dict):
            _write_out_shorthands(value, here)
        elif value is not None and (meaning := _shorthand_key(here)):
            tree[key] = {meaning: value}


def _name_judges(tree: dict[str, Any]) -> None:
    """Write out judges that are named as a model behind a server, beside what they set more."""
    evaluate, models = tree.get("evaluate"), tree.get("models")
    benchmarks = evaluate.get("benchmarks") if isinstance(evaluate, dict) else None
    kept = {field.name for field in dataclasses.fields(Endpoint)}
    for benchmark in benchmarks.values() if isinstance(benchmarks, dict) else ():
        judge = benchmark.get("judge") if isinstance(benchmark, dict) else None
        own = {"model": judge} if isinstance(judge, str) else judge
        if not isinstance(own, dict) or "endpoint" in own or not isinstance(models, dict):
            continue
        named = models.get(str(own.get("model")))
        if isinstance(named, dict) and "endpoint" in named:
            shared = {key: value for key, value in named.items() if key in kept}
            benchmark["judge"] = {**shared, **own, "model": named.get("model")}


def _merge_train(tree: dict[str, Any]) -> None:
    """Merge the recipe's `train` into each stage's; separate fields of TrainingArguments."""
    shared = _as_mapping(tree.get("train"), "train")
    stages = _as_mapping(tree.get("stages"), "stages")
    untrained = {kind.key for kind in stage_kinds().values() if not kind.trains}
    for name in stages:
        where = f"stages.{name}"
        stage = stages[name] = _as_mapping(stages[name], where)
        if stage.keys() & untrained and "train" not in stage:
            continue
        if (
            isinstance(rollouts := stage.get("rollouts"), dict)
            and rollouts.get("engine") == "local"
        ):
            rollouts["engine"] = None  # the default
        own = _as_mapping(stage.get("train"), f"{where}.train")
        check_train(own, where=f"{where}.train")
        stage["train"] = _separate_arguments({**shared, **own})
    check_train(shared, where="train")
    tree["train"] = _separate_arguments(shared)


def _separate_arguments(train: dict[str, Any]) -> dict[str, Any]:
    theirs = {key: value for key, value in train.items() if key not in OUR_TRAIN_KEYS}
    return {**{k: v for k, v in train.items() if k not in theirs}, "arguments": theirs}


def _name_sources(tree: dict[str, Any]) -> None:
    sources = _as_mapping(tree.get("data"), "data")
    for name in sources:
        source = sources[name] = _as_mapping(sources[name], f"data.{name}")
        if "name" in source:
            raise unknown_key(f"data.{name}.name", "name", known_keys(["data", name]))
        source["name"] = str(name)


def _as_mapping(value: Any, where: str) -> dict[str, Any]:
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise InputError("not a mapping", where=where, found=describe_value(value))
    return value


def _without_none(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_none(item) for key, item in value.items() if item is not None}
    if isinstance(value, list | tuple):
        return [_without_none(item) for item in value]
    return value
