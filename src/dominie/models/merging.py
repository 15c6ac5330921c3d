"""Merges several models: sums their weights, a tensor at a time."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from dominie.core.errors import InputError
from dominie.core.references import ModelName
from dominie.models.spec import Model
from dominie.models.weight_writer import write_weights
from dominie.models.weights import (
    Weights,
    copy_configuration,
    open_weights,
)


@dataclass(frozen=True, kw_only=True)
class Merge:
    """Weights of several models of one architecture, summed.

    Attributes:
        models: weight of each model, by a stage's name, a name under models, a path or hub id.
        method: `linear` is Σ wᵢ·θᵢ, the weights normalised to sum to one (model soups, Wortsman et
            al. 2022; LM-Cocktail, Xiao et al. 2023); `task_arithmetic` is θ_base + Σ wᵢ·(θᵢ −
            θ_base), the weights as they stand (Ilharco et al. 2023).
        base: what task arithmetic starts from.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid", "strict": True}
    models: dict[ModelName, float]
    method: Literal["linear", "task_arithmetic"] = "linear"
    base: ModelName | None = None

    def __post_init__(self) -> None:
        if not self.models:
            raise ValueError("models names nothing to merge")
        if not all(map(math.isfinite, self.models.values())):
            raise ValueError("the weights of models must be finite")
        if self.method == "linear" and sum(self.models.values()) <= 0:
            raise ValueError("the weights of a linear merge must sum to more than 0")
        if (self.base is not None) != (self.method == "task_arithmetic"):
            raise ValueError(
                "task_arithmetic needs a base to measure from"
                if self.base is None
                else "a linear merge has no base; name it among models, or use task_arithmetic"
            )

    @property
    def sources(self) -> list[str]:
        """Every model that is read; the first gives configuration and tokenizer."""
        return list(dict.fromkeys([*([self.base] if self.base else []), *self.models]))

    def coefficients(self) -> dict[str, float]:
        """What each model of `sources` is multiplied by in the sum."""
        if self.base is None:
            whole = sum(self.models.values())
            return {name: weight / whole for name, weight in self.models.items()}
        added = dict.fromkeys(self.sources, 0.0) | self.models
        added[self.base] += 1.0 - sum(self.models.values())
        return added


def merge_models(merge: Merge, models: Mapping[str, Model], folder: Path) -> int:
    """Write the merged model's weights and configuration.

    Sums are taken in fp32 and written in the dtype of the first model; what is not floating point
    is the first model's. If some of the models have one weight for head and embedding and others
    have two, the merged model has two.

    Args:
        merge: which models, by which weights.
        models: what its names stand for.
        folder: an empty or missing folder.

    Returns:
        The parameters of the merged model.

    Raises:
        InputError: models whose tensors differ in name or shape, that cannot be read, or whose sum
            is not finite or zeros.
    """
    coefficients = merge.coefficients()
    first = merge.sources[0]
    with contextlib.ExitStack() as stack:
        opened = {name: stack.enter_context(open_weights(models[name])) for name in merge.sources}
        tied = opened[first].shapes
        opened = _untied(opened)
        for name in merge.sources[1:]:
            _check_alike(opened[first], opened[name], where=name, first=first)
        shapes = opened[first].shapes

        def merged(name: str) -> Tensor:
            if not shapes[name].is_floating_point():
                return opened[first][name]
            total = torch.zeros(shapes[name].shape, dtype=torch.float32)
            for model, coefficient in coefficients.items():
                if coefficient:
                    total.add_(opened[model][name].float(), alpha=coefficient)
            return total.to(shapes[name].dtype)

        write_weights(folder, shapes, merged, opened)
        copy_configuration(opened[first].folder, folder)
        if shapes.keys() != tied.keys():
            _write_untied(folder / "config.json")
        return sum(shape.numel() for shape in shapes.values())


def _untied(opened: Mapping[str, Weights]) -> dict[str, Weights]:
    """Give models of tied weights a second name for them if others have two weights there."""
    every = {name for weights in opened.values() for name in weights.shapes}
    found = {}
    for model, weights in opened.items():
        missing = every - weights.shapes.keys()
        ties = _tied_names(weights.folder) if missing else {}
        known = {new: old for new, old in ties.items() if new in missing and old in weights.shapes}
        found[model] = weights.with_names(known)
    return found


def _tied_names(folder: Path) -> dict[str, str]:
    """The weights that a model's files leave out, each with the one it is tied to."""
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    except Exception:  # a family that is not known: its tensors are compared as they are
        return {}
    found: dict[str, str] = model.all_tied_weights_keys
    return found


def _write_untied(path: Path) -> None:
    """Say in a configuration that head and embedding have weights of their own."""
    config = json.loads(path.read_text(encoding="utf-8"))
    for part in (config, config.get("text_config")):
        if isinstance(part, dict):
            part["tie_word_embeddings"] = False
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _check_alike(one: Weights, other: Weights, *, where: str, first: str) -> None:
    """Refuse a sum of tensors that are not each other's."""
    apart = one.shapes.keys() ^ other.shapes.keys()
    apart |= {n for n in one.shapes.keys() - apart if one.shapes[n].shape != other.shapes[n].shape}
    if not apart:
        return
    name = min(apart)
    raise InputError(
        "models of different shape cannot be merged",
        where=where,
        expected=f"{name} as in {first}: {_shape(one, name)}",
        found=f"{_shape(other, name)}"
        + (f"; {len(apart) - 1} more differ" if apart - {name} else ""),
        do="merge models that were trained from one model",
    )


def _shape(weights: Weights, name: str) -> str:
    return str(list(weights.shapes[name].shape)) if name in weights.shapes else "no such tensor"
