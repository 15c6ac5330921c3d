"""What may stand under `train`: fields of TrainingArguments, and a gap that is followed."""

from __future__ import annotations

import dataclasses
import math
import typing
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any

import pydantic

from dominie.core.errors import InputError
from dominie.recipe.messages import unknown_key, wrong_type
from dominie.training.settings import TrainSettings

if TYPE_CHECKING:
    from dominie.losses.terms import LossTerms

#: TrainingArguments that dominie derives itself; setting them in a recipe would have two masters.
DERIVED = {
    "output_dir": "the run folder (`--runs DIR`)",
    "per_device_train_batch_size": "micro_batch",
    "per_device_eval_batch_size": "micro_batch",
    "gradient_accumulation_steps": "batch and micro_batch",
    "num_train_epochs": "epochs",
    "max_steps": "steps",
    "bf16": "precision",
    "fp16": "precision",
    "logging_steps": "log_every",
    "logging_strategy": "log_every",
    "logging_first_step": "log_every",
    "logging_nan_inf_filter": "log_every",
    "eval_on_start": "evaluate_every",
    "eval_strategy": "evaluate_every",
    "eval_steps": "evaluate_every",
    "save_strategy": "checkpoint_every",
    "save_steps": "checkpoint_every",
    "save_only_model": "the checkpoints, which hold all that a resumed run needs",
    "ignore_data_skip": "the checkpoints, which hold all that a resumed run needs",
    "auto_find_batch_size": "micro_batch",
    "train_sampling_strategy": "the mix of a stage's sources",
    "gradient_checkpointing_kwargs": "gradient_checkpointing",
    "activation_checkpointing": "gradient_checkpointing",
    "activation_checkpointing_kwargs": "gradient_checkpointing",
    "load_best_model_at_end": "keep",
    "metric_for_best_model": "keep",
    "greater_is_better": "keep",
    "resume_from_checkpoint": "the run folder: `dominie run` resumes by itself",
    "data_seed": "seed",
    "label_smoothing_factor": "the loss terms",
    "hub_token": "the environment variable HF_TOKEN: a key is never written in a recipe",
    "push_to_hub_token": "the environment variable HF_TOKEN: a key is never written in a recipe",
    "remove_unused_columns": "the batch's own format",
    "label_names": "the batch's own format",
    "disable_tqdm": "the progress display",
    "average_tokens_across_devices": "the denominator: all supervised tokens of a step",
}

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


def check_gap(
    losses: Mapping[str, LossTerms],
    teachers: Mapping[str, str | None],
    references: Collection[str],
    *,
    one_source_a_step: bool,
    where: str,
) -> None:
    """Refuse to follow a gap where sources have none, or none that can be compared.

    Args:
        losses: of the sources that a stage learns from.
        teachers: of the same sources.
        references: those whose teacher is what the student starts as.
        one_source_a_step: whether a step's conversations are all of one source.
        where: the path of the stage.

    Raises:
        InputError: names the source.
    """
    here = f"{where}.train.balance.gap"
    for source, loss in losses.items():
        if teachers[source] is None or not loss.weighs("prediction"):
            raise InputError(
                f"source {source} has no gap to its teacher",
                where=here,
                expected="a teacher and a prediction loss on every source",
                found=f"{source} without a {'prediction loss' if teachers[source] else 'teacher'}",
                do="remove gap, or give the source a teacher and a prediction loss",
            )
    experts = [source for source in losses if source not in references]
    if len(experts) < 2:
        raise InputError(
            "a gap is followed among sources that have an expert, and there are not two",
            where=here,
            expected="two or more sources whose teacher is not what the student starts as",
            found=", ".join(experts) or "none",
            do="remove gap",
        )
    compared = {(p.kind, p.temperature, p.beta) for s in experts if (p := losses[s].prediction)}
    if len(compared) > 1:
        raise InputError(
            "the gaps of these sources are different quantities",
            where=here,
            expected="one kind, temperature and beta of the prediction loss on experts' sources",
            found=f"different ones on {', '.join(experts)}",
            do="remove gap, or make them equal",
        )
    if one_source_a_step:
        raise InputError(
            "a gap moves weight within a step, and each step has one source",
            where=here,
            expected="mixing: conversations or micro_batches",
            found="mixing: steps",
            do="remove gap, or change train.mixing",
        )
