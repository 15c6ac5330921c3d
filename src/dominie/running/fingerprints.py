"""What a result depends on, as one short text that changes exactly when any of it does."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dominie.models.spec import Model, rounded
from dominie.recipe import Recipe
from dominie.training.trackers import SHOWN

#: Part of every fingerprint: raised when the same recipe would come to something else.
FORMAT = 1

#: Fields of TrainingArguments that change how a stage runs and not what comes of it.
HARMLESS = frozenset(
    {
        *SHOWN,
        "dataloader_num_workers",
        "dataloader_persistent_workers",
        "dataloader_pin_memory",
        "dataloader_prefetch_factor",
        "log_level",
        "log_level_replica",
        "log_on_each_node",
    }
)

#: Fields of `train` that change how a stage runs and not what comes of it.
_UNTAUGHT = (
    "log_every",
    "checkpoint_every",
    "source_gradients",
    "max_spike",
    "teacher_micro_batch",
)

_SMALL = 2**24  # bytes


def digest(*parts: Any) -> str:
    """16 hexadecimal digits of anything JSON can hold."""
    text = json.dumps([FORMAT, *parts], sort_keys=True, default=str)
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def training_parts(
    recipe: Recipe, name: str, *, rows: Mapping[str, str], models: Mapping[str, str]
) -> tuple[dict[str, Any], str, dict[str, Any]]:
    """What the model of a stage that trains depends on: settings, student, sources.

    Args:
        recipe: the resolved recipe.
        name: of the stage.
        rows: digest of the training rows of each source the stage learns from.
        models: fingerprint of each model the stage needs, by the recipe's name for it.
    """
    stage = recipe.trained[name]
    train = dataclasses.asdict(stage.train)
    for key in _UNTAUGHT:
        train.pop(key)
    train["arguments"] = {k: v for k, v in train["arguments"].items() if k not in HARMLESS}
    if not stage.train.validation_decides:
        for key in ("evaluate_every", "evaluate_rows"):
            train.pop(key)  # then it changes what is seen, not what is learnt
    sources = {}
    for source in stage.active:
        teacher = stage.teacher_on(source)
        sources[source] = {
            "share": stage.data[source].share,
            "loss": dataclasses.asdict(stage.loss_on(source)),
            "teacher": teacher and models[teacher],
            "rows": rows[source],
        }
        if teacher in recipe.stages and (bits := rounded(recipe.placement(teacher))):
            sources[source]["quantize"] = bits  # of other models their own fingerprint tells
        if cache := stage.cache_on(source):
            sources[source]["cache"] = cache.identity
    return train, models[stage.student], sources


def making_parts(
    recipe: Recipe, name: str, models: Mapping[str, str], rows: str | None = None
) -> tuple[Any, ...]:
    """What a model depends on that a stage makes without training; names are only their order.

    Args:
        recipe: the resolved recipe.
        name: of the stage.
        models: fingerprint of each model it reads, by the recipe's name for it.
        rows: digest of the conversations it reads, if any.
    """
    stage = recipe.stages[name]
    numbered = stage.renamed(lambda model: str(stage.models.index(model)))
    read = [models[model] for model in stage.models]
    made = dataclasses.asdict(numbered)
    del made["placement"]  # is for those that it teaches
    return made, read, *([rows] if rows else [])


def model_fingerprint(spec: Model) -> str:
    """A model that no stage makes: by name on the hub, by what lies in a folder, wherever it is."""
    identity = dataclasses.asdict(spec)
    del identity["placement"]  # where weights lie changes nothing, unless they are rounded
    identity["quantize"] = spec.bits
    for key, path in (("path", spec.path), ("adapter", spec.adapter)):
        if path and Path(path).is_dir():
            files = sorted(
                entry
                for entry in Path(path).iterdir()
                if entry.is_file() and entry.name != "README.md"  # its card changes nothing
            )
            identity[key] = [(file.name, *_identity(file)) for file in files]
    return digest(identity)


def _identity(file: Path) -> tuple[Any, ...]:
    """The content of a small file; the size and time of a large one, which is slow to read."""
    stat = file.stat()
    if stat.st_size > _SMALL:
        return stat.st_size, stat.st_mtime_ns
    return (hashlib.blake2b(file.read_bytes(), digest_size=16).hexdigest(),)
