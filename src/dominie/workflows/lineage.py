"""Where a model comes from, and under which licence."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from dominie.core.errors import InputError
from dominie.models.gguf_header import is_gguf, read_header
from dominie.models.model_folder import base_and_adapter
from dominie.models.spec import Model
from dominie.recipe import Recipe

#: Licences, by the hub's names, that do not restrict models trained on a model's outputs.
PERMISSIVE = {
    "0bsd", "apache-2.0", "bsd", "bsd-2-clause", "bsd-3-clause", "bsd-3-clause-clear", "bsl-1.0",
    "cc-by-4.0", "cc0-1.0", "isc", "mit", "ms-pl", "ncsa", "pddl", "unlicense", "wtfpl", "zlib",
}  # fmt: skip


@functools.cache
def licence_of(spec: Model) -> str | None:
    """The licence that a model's card names, None if there is none to be read.

    The card of a model of the hub is read if it was fetched, else asked for.
    """
    from huggingface_hub import ModelCard, model_info, try_to_load_from_cache

    path, revision = base_and_adapter(spec)[0], spec.revision
    try:
        if is_gguf(path):
            return str(read_header(path).metadata.get("general.license") or "") or None
        if Path(path).is_dir():
            data = ModelCard.load(Path(path) / "README.md").data
        elif isinstance(
            fetched := try_to_load_from_cache(path, "README.md", revision=revision), str
        ):
            data = ModelCard.load(fetched).data
        else:
            data = model_info(path, revision=revision, timeout=10).card_data
    except Exception:  # no card, somebody's YAML, or whatever the hub client raises
        return None
    licence = getattr(data, "license", None)
    if licence == "other":
        licence = getattr(data, "license_name", None) or licence
    return str(licence) if licence else None


def warnings(
    inherited: str | None, teachers: Mapping[str, str | None], student: str | None
) -> list[str]:
    """What whoever publishes a model has to look at first.

    Args:
        inherited: the licence of the model that it began as.
        teachers: licences of those it learnt from, by name.
        student: the model it began as; None if nobody has to be asked about it.
    """
    found = []
    if inherited is None and student is not None:
        found.append(
            f"The licence of {student}, which this model began as, could not be read. Put it under "
            "`license:` at the top of this file before you publish."
        )
    for name, licence in teachers.items():
        if licence is None:
            found.append(
                f"The licence of the teacher {name} could not be read. Make sure that it lets you "
                "train other models on its outputs."
            )
        elif licence.lower() not in PERMISSIVE:
            found.append(
                f"The teacher {name} is under `{licence}`, which may restrict models that were "
                "trained on its outputs. Read its terms before you publish this one."
            )
    return found


@dataclass(frozen=True)
class Lineage:
    """The ancestry of a stage's model.

    Attributes:
        stages: in the order in which they ran, the model's own last.
        students: models it began as, that no stage made; of a merge there may be several.
        teachers: models it learnt from, directly or by way of a stage, that no stage made.
    """

    stages: tuple[str, ...]
    students: tuple[str, ...]
    teachers: tuple[str, ...]


def lineage(recipe: Recipe, name: str) -> Lineage:
    """The ancestry of the model that stage `name` makes."""
    needed = recipe.needed([name])
    order = tuple(stage for stage in recipe.stages if stage in needed)
    students = _began_as(recipe, name)
    others = [
        model
        for stage in order
        for model in recipe.stages[stage].models
        if model not in recipe.stages and model not in students
    ]
    return Lineage(order, tuple(students), tuple(dict.fromkeys(others)))


def _began_as(recipe: Recipe, name: str) -> list[str]:
    """The models at the beginning of the chain of students."""
    if name not in recipe.stages:
        return [name]
    parents = recipe.stages[name].begins_from
    return list(dict.fromkeys(root for parent in parents for root in _began_as(recipe, parent)))


def public_name(recipe: Recipe, name: str) -> str:
    """The public name of a model: its id on the hub, or the last part of a folder's path."""
    if name in recipe.stages:
        return name
    if (served := recipe.served.get(name)) is not None:
        return served.model
    path = recipe.model(name).path
    return Path(path).name if is_private(path) else path


def rounding(recipe: Recipe, name: str) -> str | None:
    """What the weights of a model that is a GGUF file are rounded to; None of any other."""
    if name in recipe.served:
        return None
    path = recipe.model(name).path
    with contextlib.suppress(InputError):  # the file has gone
        return read_header(path).rounded if is_gguf(path) else None
    return None


def is_private(path: str) -> bool:
    """Whether a path is a place on this machine, which nobody else has."""
    return path.startswith(("/", ".", "~")) or Path(path).exists()


def hub_id(recipe: Recipe, name: str) -> str | None:
    """The id of a model on the hub, None if it has none."""
    if name in recipe.served:
        return None
    path = recipe.model(name).path
    return None if is_private(path) or path.startswith("toyworld:") else path
