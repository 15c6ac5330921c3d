"""Writes the weights that a smaller model keeps of a larger one, a tensor at a time."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from dominie.core.errors import InputError
from dominie.models.gguf_header import is_gguf
from dominie.models.info import ModelInfo, describe
from dominie.models.model_folder import base_and_adapter
from dominie.models.pruning import Prune, changes, heads_in_group
from dominie.models.spec import Model
from dominie.models.weight_writer import write_weights
from dominie.models.weights import UNUSED, Weights, copy_configuration, open_weights

_LAYER = re.compile(r"(?P<before>.*\blayers\.)(?P<number>\d+)(?P<after>\..+)")
_EXPERT = re.compile(r"(?P<before>.*\.experts\.)(?P<number>\d+)(?P<after>\..+)")

_NORM = ("channel",)
#: What the dimensions of a module's weight are; those of its bias begin the same.
_AXES: dict[str, tuple[str | None, ...]] = {
    "embed_tokens": (None, "channel"),
    "lm_head": (None, "channel"),
    "q_proj": ("query", "channel"),
    "k_proj": ("key", "channel"),
    "v_proj": ("key", "channel"),
    "o_proj": ("channel", "query"),
    "gate_proj": ("neuron", "channel"),
    "up_proj": ("neuron", "channel"),
    "down_proj": ("channel", "neuron"),
    "w1": (None, "channel"),
    "w2": ("channel", None),
    "w3": (None, "channel"),
    "gate": ("expert", "channel"),
    "q_norm": (None,),
    "k_norm": (None,),
    "norm": _NORM,
    "input_layernorm": _NORM,
    "post_attention_layernorm": _NORM,
    "pre_feedforward_layernorm": _NORM,
    "post_feedforward_layernorm": _NORM,
}


@dataclass(frozen=True, kw_only=True)
class Kept:
    """What is kept of a model, by the larger model's numbers, ascending; None is all.

    Attributes:
        layers: of the decoder.
        key_heads: [layers of the larger model, n] key heads, with the query heads that share them.
        neurons: [layers of the larger model, n] of the feed-forward layers.
        experts: [layers of the larger model, n] routed experts.
        channels: [n] of the hidden state.
    """

    layers: Sequence[int]
    key_heads: Tensor | None = None
    neurons: Tensor | None = None
    experts: Tensor | None = None
    channels: Tensor | None = None


@dataclass(frozen=True)
class _Cut:
    """A tensor of the larger model, and the indices that are kept of its dimensions."""

    name: str
    indices: Mapping[int, Tensor] = field(default_factory=dict)

    def of(self, tensor: Tensor) -> Tensor:
        for dimension, index in self.indices.items():
            tensor = tensor.index_select(dimension, index)
        return tensor

    def shape(self, whole: Tensor) -> Tensor:
        sizes = [len(self.indices.get(d, range(size))) for d, size in enumerate(whole.shape)]
        return whole.new_empty(sizes)


def prune_model(prune: Prune, model: Model, folder: Path, kept: Kept) -> int:
    """Write the smaller model's weights and configuration.

    Weights come out bit for bit as they went in. Memory holds one tensor at a time.

    Args:
        prune: the settings.
        model: the larger model.
        folder: an empty or missing folder.
        kept: as many parts as the settings ask for.

    Returns:
        The parameters of the smaller model.

    Raises:
        InputError: a model that cannot be pruned or read, or whose weights are not finite or zeros.
    """
    check_text_model(model, where=prune.model)
    info = describe(model, name=prune.model)
    changed = changes(prune, info, where=prune.model, layers=kept.layers)
    with open_weights(model) as weights:
        settings = json.loads((weights.folder / "config.json").read_text(encoding="utf-8"))
        cuts = _cuts(weights, info, kept, where=prune.model)
        shapes = {name: cut.shape(weights.shapes[cut.name]) for name, cut in cuts.items()}

        def made(name: str) -> Tensor:
            return cuts[name].of(weights[cuts[name].name])

        write_weights(folder, shapes, made, {prune.model: weights})
        copy_configuration(weights.folder, folder)
    text = json.dumps(settings | changed, indent=2, sort_keys=True) + "\n"
    (folder / "config.json").write_text(text, encoding="utf-8")
    return sum(shape.numel() for shape in shapes.values())


def check_text_model(model: Model, *, where: str) -> None:
    """Refuse a model whose language part is one of several.

    Raises:
        InputError: its configuration has other parts.
    """
    from transformers import PreTrainedConfig

    base, _ = base_and_adapter(model)
    if is_gguf(base):
        return  # what else a model reads is in a file of its own
    settings, _ = PreTrainedConfig.get_config_dict(base, revision=model.revision)
    if "text_config" in settings:
        raise InputError(
            "models that read more than text cannot be pruned",
            where=where,
            expected="a model of text alone",
            found=str(settings.get("model_type")),
            do="save its language model alone with transformers, or choose a text model",
        )


def _cuts(weights: Weights, info: ModelInfo, kept: Kept, *, where: str) -> dict[str, _Cut]:
    """By the name of each tensor of the smaller model, what it is cut from."""
    new_number = {old: new for new, old in enumerate(kept.layers)}
    cuts, seen = {}, set()
    for name in weights.shapes:
        if name.endswith(UNUSED):
            continue
        new, layer = name, None
        if found := _LAYER.fullmatch(name):
            layer = int(found["number"])
            seen.add(layer)
            if layer not in new_number:
                continue
            new = f"{found['before']}{new_number[layer]}{found['after']}"
            if kept.experts is not None and (expert := _EXPERT.fullmatch(new)):
                ours = kept.experts[layer].tolist()
                if int(expert["number"]) not in ours:
                    continue
                number = ours.index(int(expert["number"]))
                new = f"{expert['before']}{number}{expert['after']}"
        cuts[new] = _Cut(name, _indices(name, layer, info, kept, where=where))
    if seen != set(range(info.need("layers", use="pruning"))):
        raise InputError(
            "the files do not hold the layers that the configuration tells of",
            where=where,
            expected=f"tensors of layers 0 to {info.layers - 1 if info.layers else 0}",
            found=f"of {len(seen)} layers",
            do="copy or download the folder again",
        )
    return cuts


def _indices(
    name: str, layer: int | None, info: ModelInfo, kept: Kept, *, where: str
) -> dict[int, Tensor]:
    """What is kept of each dimension of a tensor; a dimension that is kept whole is no entry."""
    by_axis = {"channel": kept.channels}
    if layer is not None:
        size, heads = info.need("head_size", use="pruning"), kept.key_heads
        by_axis["key"] = heads if heads is None else _rows(heads[layer], size)
        by_axis["query"] = (
            heads if heads is None else _rows(heads[layer], size * heads_in_group(info))
        )
        by_axis["neuron"] = None if kept.neurons is None else kept.neurons[layer]
        by_axis["expert"] = None if kept.experts is None else kept.experts[layer]
    if all(index is None for index in by_axis.values()):
        return {}
    module, _, which = name.rpartition(".")
    axes = _AXES.get(module.rpartition(".")[2])
    if axes is None or which not in ("weight", "bias"):
        raise InputError(
            "a tensor cannot be made narrower, since its dimensions are not known",
            where=where,
            found=name,
            do="leave out layers alone",
        )
    dimensions = enumerate(axes if which == "weight" else axes[:1])
    found = {dimension: by_axis.get(axis or "") for dimension, axis in dimensions}
    return {dimension: index for dimension, index in found.items() if index is not None}


def _rows(groups: Tensor, size: int) -> Tensor:
    """The rows of groups of `size` rows each."""
    return (groups[:, None] * size + torch.arange(size)).flatten()
