"""Cuts a smaller model out of a larger one, a tensor at a time."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from dominie.core.errors import InputError
from dominie.core.references import ModelName, SourceName
from dominie.models.info import ModelInfo, describe
from dominie.models.spec import Model
from dominie.models.weight_writer import write_weights
from dominie.models.weights import UNUSED, Weights, copy_configuration, open_weights

#: Families whose layers can be left out, by `model_type`.
FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma3_text", "mixtral")

_LAYER = re.compile(r"(?P<before>.*\blayers\.)(?P<number>\d+)(?P<after>\..+)")
_EDGE = 2  # layers at either end that are never in a block that is left out


@dataclass(frozen=True, kw_only=True)
class Prune:
    """A model with fewer layers of a larger one; docs/prune.md says which to leave out.

    Attributes:
        model: the larger model, which gives weights, configuration and tokenizer.
        layers: how many of its layers are kept, or the numbers of those that are, from 0.
        keep: which, if `layers` is a number. `uniform` (the default) spreads them evenly, the first
            and the last among them; `ends` keeps the first half and the second half of them, so
            that the middle block is left out; `influence` leaves out the block whose ends have the
            most similar hidden states (Gromov et al. 2024, arXiv 2403.17887).
        source: of the recipe's data: `influence` reads conversations that it trains on; the loss of
            both models is measured on those that it holds out for validation.
        rows: at most so many conversations of either kind.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid", "strict": True}
    model: ModelName
    layers: int | list[int]
    keep: Literal["uniform", "ends", "influence"] | None = None
    source: SourceName | None = None
    rows: int = 256

    def __post_init__(self) -> None:
        if isinstance(self.layers, int):
            if self.layers < 1:
                raise ValueError(f"layers must be at least 1, got {self.layers}")
        elif not self.layers or sorted(set(self.layers)) != self.layers or self.layers[0] < 0:
            raise ValueError(
                "layers must be a number, or a list of layers from 0 that ascends and names none "
                f"twice, got {self.layers}"
            )
        elif self.keep is not None:
            raise ValueError(f"keep {self.keep} chooses layers, and layers lists them")
        if self.keep == "influence":
            if self.layers == 1:
                raise ValueError("influence keeps the first and the last layer: layers: 2 or more")
            if self.source is None:
                raise ValueError("keep influence needs a source to read")
        if self.rows < 1:
            raise ValueError(f"rows must be at least 1, got {self.rows}")

    def chosen_layers(self, depth: int) -> list[int] | None:
        """The layers of `depth` that are kept, ascending; None if hidden states decide."""
        if not isinstance(self.layers, int):
            return self.layers
        if self.keep == "influence":
            return None
        if self.keep == "ends":
            return without_block(depth, self.layers, (self.layers + 1) // 2)
        last = max(1, self.layers - 1)
        return [(2 * n * (depth - 1) + last) // (2 * last) for n in range(self.layers)]

    def block_starts(self, depth: int) -> range:
        """Where the block that `influence` leaves out of `depth` layers may begin.

        The first and last two layers are kept, of three or fewer the first and the last.
        """
        assert isinstance(self.layers, int), "checked above"
        edge = max(1, min(_EDGE, self.layers // 2))
        return range(edge, self.layers - edge + 1)


def without_block(depth: int, kept: int, start: int) -> list[int]:
    """The layers of `depth` but for the one block from `start` that leaves so many."""
    return [*range(start), *range(start + depth - kept, depth)]


def layer_changes(settings: Mapping[str, Any], depth: int, kept: Sequence[int]) -> dict[str, Any]:
    """The entries of a configuration that change if only some of its layers are kept.

    Args:
        settings: a configuration of `depth` layers.
        depth: how many layers it has.
        kept: numbers of the layers that are kept, ascending.
    """
    changed: dict[str, Any] = {
        key: [value[layer] for layer in kept]
        for key, value in settings.items()
        if isinstance(value, list) and len(value) == depth
        if "token" not in key and key not in ("architectures", "kept_layers")
    }
    if isinstance(full := settings.get("max_window_layers"), int):
        changed["max_window_layers"] = sum(layer < full for layer in kept)
    return {**changed, "num_hidden_layers": len(kept)}


def pruned_config(
    prune: Prune, model: ModelInfo, *, where: str, layers: Sequence[int] | None = None
) -> Any:
    """The configuration of the smaller model.

    Args:
        prune: the settings.
        model: what is known of the larger one.
        where: what a message names.
        layers: those that are kept, of `influence`; None is one block of as many as will be, whose
            sizes are the same.

    Raises:
        InputError: a family that cannot be pruned, or layers that the model has not.
    """
    config = copy.deepcopy(model.need("config", use="pruning"))
    for key, value in _changes(prune, model, where=where, layers=layers).items():
        setattr(config, key, value)
    return config


def _changes(
    prune: Prune, model: ModelInfo, *, where: str, layers: Sequence[int] | None
) -> dict[str, Any]:
    """The entries of the larger model's configuration that are others in the smaller one's."""
    check_prunable(prune, model, where=where)
    depth: int = model.need("layers", use="pruning")
    if layers is None:
        layers = prune.chosen_layers(depth)
    if layers is None:
        assert isinstance(prune.layers, int), "influence is of a number"
        layers = without_block(depth, prune.layers, prune.block_starts(depth)[-1])
    origin, whole = model.kept_layers or range(depth), model.original_layers or depth
    return {
        **layer_changes(vars(model.config), depth, layers),
        "kept_layers": [origin[layer] for layer in layers],
        "original_num_hidden_layers": whole,
    }


def check_prunable(prune: Prune, model: ModelInfo, *, where: str) -> None:
    """Refuse a model that cannot be cut, or not so.

    Raises:
        InputError: names what is wrong, and the families that can be.
    """
    config = model.need("config", use="pruning")
    if model.family not in FAMILIES:
        raise InputError(
            "models of this architecture cannot be pruned",
            where=where,
            expected=f"one of {', '.join(FAMILIES)}",
            found=f"{model.family}, the model {prune.model}",
            do="begin with a smaller model of the family",
        )
    if model.adapter is not None:
        raise InputError(
            "an adapter cannot be pruned",
            where=where,
            expected="a whole model",
            found=prune.model,
            do="let the stage that trains it write whole weights: train.lora.merge: true",
        )
    if getattr(config, "quantization_config", None) is not None:
        raise InputError(
            "quantised weights cannot be pruned",
            where=where,
            found=prune.model,
            do="name the model before it was quantised",
        )
    depth = model.need("layers", use="pruning")
    kept = prune.layers if isinstance(prune.layers, int) else len(prune.layers)
    highest = kept - 1 if isinstance(prune.layers, int) else prune.layers[-1]
    if highest >= depth:
        raise InputError(
            "the model does not have the layers that are to be kept",
            where=f"{where}.layers",
            expected=f"fewer than {depth}, or numbers from 0 to {depth - 1}",
            found=str(prune.layers),
        )
    if kept == depth:
        raise InputError(
            "nothing is left out of the model",
            where=f"{where}.layers",
            expected=f"fewer than its {depth} layers",
            found=str(prune.layers),
        )


def prune_model(prune: Prune, model: Model, folder: Path, layers: Sequence[int]) -> int:
    """Write the smaller model's weights and configuration.

    Weights come out bit for bit as they went in. Memory holds one tensor at a time.

    Args:
        prune: the settings.
        model: the larger model.
        folder: an empty or missing folder.
        layers: numbers of the layers that are kept, ascending.

    Returns:
        The parameters of the smaller model.

    Raises:
        InputError: a model that cannot be pruned or read, or whose weights are not finite or zeros.
    """
    info = describe(model, name=prune.model)
    changed = _changes(prune, info, where=prune.model, layers=layers)
    with open_weights(model) as weights:
        names = _names(weights, info, layers, where=prune.model)
        shapes = {new: weights.shapes[old] for new, old in names.items()}
        write_weights(folder, shapes, lambda name: weights[names[name]], {prune.model: weights})
        copy_configuration(weights.folder, folder)
    file = folder / "config.json"
    settings = json.loads(file.read_text(encoding="utf-8")) | changed
    file.write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return sum(shape.numel() for shape in shapes.values())


def _names(
    weights: Weights, info: ModelInfo, layers: Sequence[int], *, where: str
) -> dict[str, str]:
    """By the name of each tensor of the smaller model, its name in the larger one."""
    new_number = {old: new for new, old in enumerate(layers)}
    names, seen = {}, set()
    for name in weights.shapes:
        found = _LAYER.fullmatch(name)
        if name.endswith(UNUSED):
            continue
        if found is None:
            names[name] = name
            continue
        old = int(found["number"])
        seen.add(old)
        if old in new_number:
            names[f"{found['before']}{new_number[old]}{found['after']}"] = name
    if seen != set(range(info.need("layers", use="pruning"))):
        raise InputError(
            "the files do not hold the layers that the configuration tells of",
            where=where,
            expected=f"tensors of layers 0 to {info.layers - 1 if info.layers else 0}",
            found=f"of {len(seen)} layers",
            do="copy or download the folder again",
        )
    return names


def kept_pairs(student: ModelInfo, teacher: ModelInfo) -> list[tuple[int, int]]:
    """Pairs (student layer, teacher layer) that were the same layer before the student was pruned.

    Args:
        student: a model that began as a pruned one.
        teacher: the model that it was cut from, one of its depth, or another cut of it.

    Raises:
        InputError: the student was not pruned, or the teacher has no such layers.
    """
    if student.kept_layers is None:
        raise InputError(
            "layers: kept pairs the layers of a pruned student with those that they were",
            where="loss.attention.layers",
            expected="a student that a prune stage made, or one trained from such a student",
            found=student.name,
            do="set layers: uniform, or list pairs [[student, teacher], …]",
        )
    depth, original = teacher.need("layers", use="comparing attention"), student.original_layers
    theirs = teacher.kept_layers or tuple(range(depth))
    whole = teacher.original_layers or depth
    lacking = set(student.kept_layers) - set(theirs)
    if whole != original or lacking:
        raise InputError(
            "the teacher has not the layers that the student was cut from",
            where="loss.attention.layers",
            expected=f"the model of {original} layers that was pruned, or another cut of it",
            found=f"{teacher.name}, of {depth} layers"
            + (f" without {sorted(lacking)[:5]} of them" if whole == original else ""),
            do="choose the model that was pruned as the teacher, or list pairs "
            "[[student, teacher], …]",
        )
    return [(layer, theirs.index(old)) for layer, old in enumerate(student.kept_layers)]
