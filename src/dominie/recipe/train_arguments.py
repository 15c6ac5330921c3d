"""Fields of transformers.TrainingArguments under `train`: which may stand there, in what range."""

from __future__ import annotations

import dataclasses
import math
import typing
from collections.abc import Mapping
from typing import Any

import pydantic

from dominie.core.errors import InputError
from dominie.recipe.messages import unknown_key, wrong_type
from dominie.training.settings import DERIVED, TrainSettings

OUR_TRAIN_KEYS = {f.name for f in dataclasses.fields(TrainSettings)} - {"arguments"}

#: Ranges that torch and transformers check when training begins, or not at all.
_RANGES: dict[str, tuple[float, float]] = {
    "adam_beta1": (0.0, 0.999999),
    "adam_beta2": (0.0, 0.999999),
    "adam_epsilon": (1e-20, 1.0),
    "dataloader_num_workers": (0, 256),
    "dataloader_prefetch_factor": (1, 1024),
    "max_grad_norm": (0.0, math.inf),
    "neftune_noise_alpha": (0.0, 1e6),
    "torch_empty_cache_steps": (1, math.inf),
    "warmup_steps": (0.0, math.inf),
    "weight_decay": (0.0, 1e6),
}


def check_train(train: Mapping[str, Any], *, where: str) -> None:
    """Refuse a field that dominie sets itself, that there is not, or whose value cannot be used.

    Args:
        train: as the recipe has it.
        where: the path of `train`.

    Raises:
        InputError: names the field.
    """
    foreign = [key for key in train if key not in OUR_TRAIN_KEYS]
    if not foreign:
        return
    from transformers import TrainingArguments

    theirs = typing.get_type_hints(TrainingArguments)
    for key in foreign:
        if key in DERIVED:
            raise InputError(
                "dominie sets this itself", where=f"{where}.{key}", do=f"use {DERIVED[key]} instead"
            )
        if key not in theirs:
            known = OUR_TRAIN_KEYS | theirs.keys() - DERIVED.keys()
            raise unknown_key(f"{where}.{key}", key, known)
        _check_type(train[key], theirs[key], where=f"{where}.{key}")
        _check_range(train[key], key, where=f"{where}.{key}")


def _check_type(value: Any, kind: Any, *, where: str) -> None:
    """Refuse a value that transformers would fail on during training."""
    if isinstance(value, float) and not math.isfinite(value):
        raise InputError("the value cannot be used", where=where, expected="a finite number")
    try:
        pydantic.TypeAdapter(kind).validate_python(value, strict=True)
    except pydantic.ValidationError as error:
        raise wrong_type(error.errors(), value, where=where) from None


def _check_range(value: Any, key: str, *, where: str) -> None:
    least, most = _RANGES.get(key, (-math.inf, math.inf))
    if isinstance(value, int | float) and not least <= value <= most:
        raise InputError(
            "the value cannot be used",
            where=where,
            expected=f"{least:g} or more" + ("" if math.isinf(most) else f", at most {most:g}"),
            found=f"{value:g}",
        )
