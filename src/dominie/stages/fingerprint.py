"""Fingerprints: what a stage depends on, as a short hash and key by key."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from dominie.data.rows import PreparedSource
from dominie.models.spec import Model, bits_of
from dominie.models.weights import model_identity
from dominie.recipe import Recipe

if TYPE_CHECKING:
    from dominie.recipe import TrainStage

#: Part of every fingerprint: raised when the same recipe would come to something else.
FORMAT = 1

#: Fields of TrainingArguments that choose where metrics are shown, and change no weight.
SHOWN = (
    "report_to",
    "run_name",
    "project",
    "trackio_space_id",
    "trackio_bucket_id",
    "trackio_static_space_id",
)

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
_HARMLESS_KEYS = (
    "log_every",
    "checkpoint_every",
    "source_gradients",
    "max_spike",
    "teacher_micro_batch",
    "forgetting",
)

#: Settings that finished stages were made without, and the defaults that leave those as they are:
#: at its default such a setting is no part of a fingerprint.
_YOUNGER: dict[str, Any] = {"next_token.kind": "cross_entropy", "spans": None}


def digest(*parts: Any) -> str:
    """Hash anything that JSON can hold to 16 hexadecimal digits."""
    text = json.dumps([FORMAT, *parts], sort_keys=True, default=str)
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def training_parts(
    recipe: Recipe, name: str, *, rows: Mapping[str, str], models: Mapping[str, str]
) -> tuple[dict[str, Any], str, dict[str, Any]]:
    """List what a stage that trains depends on: settings, student, sources.

    Args:
        rows: digest of the training rows of each source the stage learns from, and of the held-out
            rows of others that decide when it ends.
        models: fingerprint of each model the stage needs, by the recipe's name for it.
    """
    stage = recipe.trained[name]
    train = dataclasses.asdict(stage.train)
    for key in _HARMLESS_KEYS:
        train.pop(key)
    if not stage.train.balances(len(stage.active)):
        train.pop("balance")  # as before there was one
    if stage.train.stop_at is None:
        train.pop("stop_at")
    elif watched := {source: rows[source] for source in rows if source not in stage.active}:
        train["stop_at"]["rows"] = watched
    train["arguments"] = {k: v for k, v in train["arguments"].items() if k not in HARMLESS}
    if not stage.train.validation_decides:
        for key in ("evaluate_every", "evaluate_rows"):
            train.pop(key)  # then it changes what is logged, not the model
    sources = {}
    for source in stage.active:
        teacher = stage.teacher_on(source)
        sources[source] = {
            "share": stage.data[source].share,
            "loss": _without_younger(dataclasses.asdict(stage.loss_on(source))),
            "teacher": teacher and models[teacher],
            "rows": rows[source],
        }
        if teacher in recipe.stages and (bits := bits_of(recipe.placement(teacher))):
            sources[source]["quantize"] = bits  # of other models it is in their own fingerprint
        if cache := stage.cache_on(source):
            sources[source]["cache"] = cache.identity
        elif teacher in recipe.served and stage.cache:
            sources[source]["scored"] = stage.cache.k_max
        if (shown := stage.shown_on(source)) is not None:
            sources[source]["shows"] = shown
        if fraction := stage.data[source].on_policy:
            sources[source]["on_policy"] = fraction
            train["rollouts"] = stage.rollout_settings.identity
    return train, models[stage.student], sources


def _without_younger(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings without those of `_YOUNGER` that have their default."""
    for key, default in _YOUNGER.items():
        *path, last = key.split(".")
        place: Any = settings
        for part in path:
            place = (place or {}).get(part)
        if place and last in place and place[last] == default:
            del place[last]
    return settings


def rows_digests(
    stage: TrainStage,
    sources: Mapping[str, PreparedSource],
    pairs: Mapping[str, str] | None = None,
) -> dict[str, str]:
    """Hash the rows that a model depends on: those that it learns, and those that choose it.

    Args:
        stage: that trains.
        sources: its rows by source, as far as they are known; of others the hash is empty.
        pairs: of sources that are compared by spans, a hash of their rows in the teacher's tokens.
    """
    train = stage.train
    held_out = {n: each.validation.first(train.evaluate_rows).digest for n, each in sources.items()}
    found = {name: sources[name].train.digest if name in sources else "" for name in stage.active}
    found |= {name: f"{found[name]}, {key}" for name, key in (pairs or {}).items()}
    if not train.validation_decides:
        return found
    for name in held_out:
        if name in found:
            found[name] += f", {held_out[name]}"
        elif train.stop_at is not None and train.stop_at.bounds_watched(name):
            found[name] = held_out[name]
    return found


def making_parts(
    recipe: Recipe,
    name: str,
    models: Mapping[str, str],
    rows: str | Mapping[str, str] | None = None,
) -> tuple[Any, ...]:
    """List what a stage that does not train depends on; of model names only their order counts.

    Args:
        models: fingerprint of each model it reads, by the recipe's name for it.
        rows: digest of the conversations it reads, if any; of several sources by name.
    """
    stage = recipe.stages[name]
    numbered = stage.renamed(lambda model: str(stage.models.index(model)))
    read = [models[model] for model in stage.models]
    settings = dataclasses.asdict(numbered)
    settings.pop("placement", None)  # does not change its result
    return settings, read, *([rows] if rows else [])


def model_fingerprint(spec: Model) -> str:
    """Hash a model that no stage makes: its name on the hub, or the content of its folder."""
    return digest(model_identity(spec))


#: What a changed hash means.
_HASHED = {
    "rows": "other conversations, or another order of them",
    "tokenizer": "another tokenizer or chat template",
    "student": "another model, or other weights",
    "teacher": "another model, or other weights",
}
_SHOWN = 6  # changes that are named; a changed teacher or tokenizer entails many


def training_dependencies(
    train: Mapping[str, Any], student: str, sources: Mapping[str, Any], tokenizer: str
) -> dict[str, Any]:
    """Flatten the dependencies of a stage that trains, to name changes by key."""
    settings = dict(train)
    settings |= settings.pop("arguments", {})
    tree = {"train": settings, "student": student, "tokenizer": tokenizer, "data": sources}
    return _flat(tree)


def making_dependencies(
    settings: Mapping[str, Any],
    models: Sequence[str],
    rows: str | Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Flatten the dependencies of a stage that does not train."""
    read: dict[str, Any] = {f"model {number}": model for number, model in enumerate(models, 1)}
    if isinstance(rows, Mapping):
        read["data"] = {source: {"rows": digest} for source, digest in rows.items()}
    else:
        read["rows"] = rows
    return _flat({**settings, **read})


def changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Describe what differs between two sets of dependencies, a phrase each."""
    apart = [key for key in sorted(before.keys() | now.keys()) if before.get(key) != now.get(key)]
    if "tokenizer" in apart or "train.max_length" in apart:  # rows differ for their sake
        apart = [key for key in apart if not key.endswith(".rows")]
    lines = [_change(key, before.get(key), now.get(key)) for key in apart]
    more = len(lines) - _SHOWN
    return [*lines[:_SHOWN], *([f"{more} more"] if more > 0 else [])]


def changed_settings(
    recipe: Recipe, name: str, before: Mapping[str, Any], models: Mapping[str, str]
) -> list[str]:
    """Describe how a stage of a recipe differs from what was made, as far as no rows tell.

    Args:
        before: dependencies in its `stage.json`.
        models: fingerprints by name; a model that is not among them decides nothing.
    """
    known = {model: models.get(model, "") for model in recipe.stages[name].models}
    if name in recipe.trained:
        rows = dict.fromkeys(recipe.trained[name].active, "")
        parts = training_parts(recipe, name, rows=rows, models=known)
        now = training_dependencies(*parts, tokenizer="")
    else:
        settings, read, *_ = making_parts(recipe, name, known)
        now = making_dependencies(settings, read)
    was, is_now = (
        ", ".join(sorted({key.split(".")[1] for key in each if key.startswith("data.")}))
        for each in (before, now)
    )
    if name in recipe.trained and before and was != is_now:
        return [f"data: {was} before, {is_now} now"]
    shared = {key: value for key, value in now.items() if value != "" and key in before}
    return changes({key: before[key] for key in shared}, shared)


def moved(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """List versions and ranks that have changed since a stage began."""
    was, current = _flat(before), _flat(now)
    return [
        f"{key.removeprefix('versions.')} {current[key]} (begun with {was[key]})"
        for key in current
        if key in was and was[key] != current[key]
    ]


def _change(key: str, before: Any, now: Any) -> str:
    last = key.rpartition(".")[2]
    name = "student" if last.startswith("model ") else last
    is_hash = name in _HASHED and (key == last or key.startswith("data."))
    if is_hash and before is not None and now is not None:
        return f"{key}: {_HASHED[name]}"
    was, is_now = ("nothing" if value is None else value for value in (before, now))
    return f"{key}: {was} before, {is_now} now"


def _flat(value: Any, path: str = "") -> dict[str, Any]:
    """Flatten to leaves by dotted path, without those that are None."""
    if isinstance(value, Mapping):
        flat: dict[str, Any] = {}
        for key, item in value.items():
            flat |= _flat(item, f"{path}.{key}" if path else str(key))
        return flat
    if value is None:
        return {}
    return {path: value if isinstance(value, str | int | float | bool) else str(value)}
