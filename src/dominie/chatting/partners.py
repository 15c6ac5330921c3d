"""Whom to talk to: models of runs, by the names that their recipes give them."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dominie.display import Display
from dominie.errors import InputError
from dominie.files.run_folders import no_such_run
from dominie.models.folders import is_model
from dominie.models.loading import load_frozen, load_tokenizer
from dominie.models.spec import Model
from dominie.recipe import Recipe, load_recipe
from dominie.running.chat_tokenizers import ChatTokenizers
from dominie.running.folder import RunFolder


@dataclass(frozen=True)
class Partner:
    """A model in evaluation mode, with its tokenizer."""

    name: str
    model: Any
    tokenizer: Any


@dataclass(frozen=True)
class _Named:
    """A model that was asked for: where it is from, and how its tokenizer is had."""

    run: str
    name: str
    spec: Model
    folder: RunFolder | None = None


def partners(wanted: Sequence[str], runs: Path, display: Display) -> list[Partner]:
    """Load the models that these words name.

    Args:
        wanted: `RUN`, `RUN:NAME` or `RUN:NAME,NAME`: a run's folder, or its name in `runs`; a
            stage, or a name under `evaluate.models` or `models`. Without a name the last stage.
            The folder of a model serves, too.
        runs: the folder of all runs.
        display: says what is loaded.

    Raises:
        InputError: no such run, no such model in it, or a stage that has not been trained.
    """
    named = [model for word in wanted for model in _named(word, runs)]
    several_runs = len({each.run for each in named}) > 1
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    found = []
    for each in dict.fromkeys(named):
        name = f"{each.run}:{each.name}" if several_runs else each.name
        display.line(f"loading {name} from {each.spec.path}")
        found.append(
            Partner(name, load_frozen(each.spec, device=device), _tokenizer(each, display))
        )
    return found


def _tokenizer(named: _Named, display: Display) -> Any:
    """The tokenizer a stage wrote beside its weights; else one with a template as in the run."""
    if named.folder is None or named.name in named.folder.recipe.stages:
        return load_tokenizer(named.spec)
    return ChatTokenizers(named.folder, display).of(_model_name(named.folder.recipe, named.name))


def _named(word: str, runs: Path) -> list[_Named]:
    place, names = Path(word), ""
    if not place.is_dir() and ":" in word:
        head, _, names = word.rpartition(":")
        place = Path(head)
    there = [path for path in (place, runs / place) if path.is_dir()]
    path = next((p for p in there if is_model(p) or _is_run(p)), there[0] if there else None)
    if path is None:
        raise no_such_run(word, place, runs)
    if is_model(path) and not names:
        home = path.resolve()
        name = home.parent.name if home.name == "model" else home.name
        return [_Named(str(path), name, Model(path=str(path)))]
    if not _is_run(path):
        recipe_here = (path / "recipe.yaml").is_file()
        raise InputError(
            "this is not a run's folder",
            where=str(path),
            expected="what `dominie run` writes: recipe.yaml and a folder for each stage",
            do=f"`dominie run {path}` makes one of its recipe"
            if recipe_here
            else "name a folder in runs/, or the model/ folder of a stage",
        )
    recipe = dataclasses.replace(load_recipe(path / "recipe.yaml"), name=path.resolve().name)
    folder = RunFolder(recipe, path.resolve().parent)
    chosen = [name.strip() for name in names.split(",") if name.strip()] or [_last(recipe)]
    return [_Named(recipe.name, name, _spec(folder, name), folder) for name in chosen]


def _is_run(path: Path) -> bool:
    """Whether a folder is a run's; that of a recipe has no stages in it."""
    return (path / "recipe.yaml").is_file() and any(path.glob("*/stage.json"))


def _last(recipe: Recipe) -> str:
    """Whom a run is about, where nobody is named: what its last stage made."""
    if recipe.stages:
        return list(recipe.stages)[-1]
    return list(recipe.evaluate.models if recipe.evaluate else recipe.models)[-1]


def _model_name(recipe: Recipe, name: str) -> str:
    """What a name of `evaluate.models` stands for; a stage's comes first."""
    if name in recipe.stages or recipe.evaluate is None:
        return name
    meant: str = recipe.evaluate.models.get(name, name)
    return meant


def _spec(folder: RunFolder, name: str) -> Model:
    recipe = folder.recipe
    known = [*recipe.stages, *(recipe.evaluate.models if recipe.evaluate else ()), *recipe.models]
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
        raise InputError(
            f"the run has no model {name!r}",
            where=str(folder.path),
            expected=", ".join(dict.fromkeys(known)),
            do=f"did you mean {folder.path}:{near[0]}?" if near else None,
        )
    meant = _model_name(recipe, name)
    spec = folder.model(meant)
    if meant in recipe.stages and not is_model(Path(spec.path)):
        raise InputError(
            f"stage {meant} has not been trained",
            where=spec.path,
            do="run `dominie run` on its recipe first",
        )
    return spec
