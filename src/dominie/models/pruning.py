"""What a prune stage keeps of a model: its settings, and the configuration that results."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from dominie.core.errors import InputError
from dominie.core.references import ModelName, SourceName
from dominie.models.info import ModelInfo

#: Families whose layers can be left out, by `model_type`.
FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma3_text", "mixtral")

_EDGE = 2  # layers at either end that are never in a block that is left out


#: Settings of width, with what a configuration calls each, and the families that cannot have it.
_PARTS = {
    "heads": ("num_attention_heads", ()),
    "intermediate_size": ("intermediate_size", ("mixtral",)),
    "hidden_size": ("hidden_size", ("gemma3_text",)),  # which scales embeddings by its root
    "experts": ("num_local_experts", tuple(name for name in FAMILIES if name != "mixtral")),
}


@dataclass(frozen=True, kw_only=True)
class Prune:
    """A smaller model cut from a larger one; docs/prune.md says what to leave out.

    Attributes:
        model: the larger model, which gives weights, configuration and tokenizer.
        layers: how many of its layers are kept, or the numbers of those that are, from 0; None
            keeps all.
        keep: which, if `layers` is a number. `uniform` (the default) spreads them evenly, the first
            and the last among them; `ends` keeps the first half and the second half of them, so
            that the middle block is left out; `influence` leaves out the block whose ends have the
            most similar hidden states (Gromov et al. 2024, arXiv 2403.17887).
        heads: query heads that each layer keeps, in whole groups of those that share a key head.
        intermediate_size: neurons that each feed-forward layer keeps.
        hidden_size: channels of the hidden state that are kept, the same in all layers.
        experts: experts that each layer of a Mixtral keeps, those that most tokens are sent to.
        source: of the recipe's data. `influence`, heads, neurons, channels and experts are chosen
            by forward passes on conversations that it trains on; the loss of both models is
            measured on those that it holds out for validation.
        rows: at most so many conversations of either kind.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid", "strict": True}
    model: ModelName
    layers: int | list[int] | None = None
    keep: Literal["uniform", "ends", "influence"] | None = None
    heads: int | None = None
    intermediate_size: int | None = None
    hidden_size: int | None = None
    experts: int | None = None
    source: SourceName | None = None
    rows: int = 256

    def __post_init__(self) -> None:
        if self.layers is None and not self.parts:
            raise ValueError(f"nothing is left out: set layers, {', '.join(_PARTS)}")
        for name, wanted in {"rows": self.rows, **self.parts}.items():
            if wanted < 1:
                raise ValueError(f"{name} must be at least 1, got {wanted}")
        if self.keep is not None and not isinstance(self.layers, int):
            raise ValueError(f"keep {self.keep} chooses layers: set layers to their number")
        if isinstance(self.layers, int) and self.layers < 1:
            raise ValueError(f"layers must be at least 1, got {self.layers}")
        if isinstance(self.layers, list) and (
            not self.layers or sorted(set(self.layers)) != self.layers or self.layers[0] < 0
        ):
            raise ValueError(
                "layers must be a number, or a list of layers from 0 that ascends and names none "
                f"twice, got {self.layers}"
            )
        if self.keep == "influence" and self.layers == 1:
            raise ValueError("influence keeps the first and the last layer: layers: 2 or more")
        if self.source is None and (self.parts or self.keep == "influence"):
            chosen = "keep influence" if self.keep == "influence" else next(iter(self.parts))
            raise ValueError(f"{chosen} needs a source to read")

    @property
    def parts(self) -> dict[str, int]:
        """The settings of width that are set."""
        return {name: found for name in _PARTS if (found := getattr(self, name)) is not None}

    def widths(self, model: ModelInfo) -> dict[str, tuple[int, int]]:
        """What the larger model has and what is kept, of the settings of width that are set."""
        return {
            name: (getattr(model.config, _PARTS[name][0]), kept)
            for name, kept in self.parts.items()
        }

    def chosen_layers(self, depth: int) -> list[int] | None:
        """The layers of `depth` that are kept, ascending; None if hidden states decide."""
        if self.layers is None:
            return list(range(depth))
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
    for key, value in changes(prune, model, where=where, layers=layers).items():
        setattr(config, key, value)
    return config


def changes(
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
    widths: dict[str, Any] = {_PARTS[name][0]: size for name, size in prune.parts.items()}
    if prune.heads is not None:
        widths["num_key_value_heads"] = prune.heads // heads_in_group(model)
    if (prune.heads or prune.hidden_size) and hasattr(model.config, "head_dim"):
        widths["head_dim"] = model.head_size  # some families divide channels by heads otherwise
    return {
        **layer_changes(vars(model.config), depth, layers),
        **widths,
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
    layers = prune.layers if isinstance(prune.layers, list) else range(prune.layers or depth)
    if layers[-1] >= depth:
        raise InputError(
            "the model does not have the layers that are to be kept",
            where=f"{where}.layers",
            expected=f"fewer than {depth}, or numbers from 0 to {depth - 1}",
            found=str(prune.layers),
        )
    if len(layers) == depth and prune.layers is not None:
        raise InputError(
            "nothing is left out of the model",
            where=f"{where}.layers",
            expected=f"fewer than its {depth} layers",
            found=str(prune.layers),
        )
    for name, size in prune.parts.items():
        _check_part(name, size, model, where=f"{where}.{name}")
    if prune.heads or prune.hidden_size:
        _check_heads(prune, model, where=where)


def heads_in_group(model: ModelInfo) -> int:
    """How many query heads share a key head."""
    heads, keys = (model.need(fact, use="pruning") for fact in ("heads", "key_heads"))
    return int(heads // keys)


def _check_part(name: str, size: int, model: ModelInfo, *, where: str) -> None:
    """Refuse a width that the family cannot have, or that leaves nothing out."""
    key, unable = _PARTS[name]
    if model.family in unable:
        able = [part for part, (_, others) in _PARTS.items() if model.family not in others]
        raise InputError(
            "models of this architecture cannot be made narrower there",
            where=where,
            expected=f"of {model.family}, layers, {', '.join(able)}",
            found=name,
        )
    whole, least = getattr(model.config, key), 1
    if name == "experts":
        least = max(2, model.need("experts_per_token", use="pruning"))
    if not least <= size < whole:
        raise InputError(
            "there are not so many parts of a layer that some can be kept and some left out",
            where=where,
            expected=f"from {least} to {whole - 1}",
            found=str(size),
        )


def _check_heads(prune: Prune, model: ModelInfo, *, where: str) -> None:
    """Refuse numbers of heads and channels that no model of the family can have."""
    group = heads_in_group(model)
    heads = prune.heads or model.need("heads", use="pruning")
    channels = prune.hidden_size or model.need("hidden_size", use="pruning")
    own = hasattr(model.config, "head_dim")
    if heads % group or channels % heads or not (own or channels == heads * (model.head_size or 0)):
        raise InputError(
            "no model of this architecture has so many heads and channels",
            where=where,
            expected=f"heads in groups of {group}, which hidden_size is a multiple of"
            + ("" if own else f", {model.head_size} channels for each of the heads"),
            found=f"{heads} heads, hidden_size {channels}",
            do="change heads, or set heads and hidden_size together",
        )


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
