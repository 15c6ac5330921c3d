"""The configuration of every model of a recipe, found without weights and without a network."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path
from typing import Any

from dominie.errors import hub_error
from dominie.models.folders import base_and_adapter
from dominie.models.mixtures import mixture_of
from dominie.models.remote_code import allowed
from dominie.models.spec import Model
from dominie.recipe import Recipe, UpcycleStage
from dominie.toyworld import is_toyworld

#: In a wheel they lie beside the package's modules, in the source in `recipes/configs`.
_SHIPPED = (Path(str(files("dominie"))) / "configs", Path(__file__).parents[3] / "recipes/configs")


def config_of(recipe: Recipe, name: str) -> Any:
    """The configuration of a model or of what a stage makes, its language part.

    Raises:
        InputError: no configuration can be reached.
    """
    while name in recipe.stages:
        stage = recipe.stages[name]
        dense = stage.models[0]
        if isinstance(stage, UpcycleStage):
            made = stage.upcycle
            return mixture_of(config_of(recipe, dense), where=f"stages.{name}").configuration(
                config_of(recipe, dense),
                experts=made.experts,
                experts_per_token=made.experts_per_token,
            )
        name = dense
    return load_plan_config(recipe.model(name)).get_text_config()


def load_plan_config(spec: Model) -> Any:
    """A configuration from a folder, the hub's cache, those shipped here, else the hub.

    Raises:
        InputError: it is in none of these places.
    """
    from transformers import AutoConfig

    if is_toyworld(spec.path):
        return _toy_config(spec.path)
    base, _ = base_and_adapter(spec)
    options: dict[str, Any] = {"revision": spec.revision, "trust_remote_code": allowed()}
    places = [(base, {"local_files_only": True})]
    if (shipped := shipped_config(base)) is not None and not Path(base).is_dir():
        places.append((str(shipped), {}))
    elif not Path(base).exists() and not base.startswith((".", "/", "~")):
        places.append((base, {}))
    for place, more in places:
        try:
            return AutoConfig.from_pretrained(place, **options, **more)
        except Exception as error:
            fault = error
    raise hub_error(fault)(
        "no configuration of this model can be reached",
        where=spec.path,
        expected="a folder with config.json, a model of the hub, or one of those shipped: "
        + ", ".join(shipped_names()),
        found=f"{type(fault).__name__}: {' '.join(str(fault).split())[:200]}",
        do="put the model's config.json into a folder and name the folder as its path",
    ) from fault


def shipped_config(path: str) -> Path | None:
    """The file of a configuration that comes with dominie, by the last two parts of a path."""
    name = "--".join(Path(path).parts[-2:]) + ".json"
    return next((folder / name for folder in _SHIPPED if (folder / name).is_file()), None)


def shipped_names() -> list[str]:
    """Models whose configuration comes with dominie."""
    found = {path.stem.replace("--", "/") for folder in _SHIPPED for path in folder.glob("*.json")}
    return sorted(found)


def _toy_config(path: str) -> Any:
    from dominie.toyworld.models import toy_config
    from dominie.toyworld.names import parsed

    request = parsed(path)
    return toy_config(request.thing, **request.size)
