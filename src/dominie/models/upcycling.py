"""Makes a mixture of experts of a dense model, a tensor at a time."""

from __future__ import annotations

import contextlib
import hashlib
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from dominie.core.errors import InputError
from dominie.core.references import ModelName, SourceName
from dominie.models.loading import load_config
from dominie.models.moe import PROJECTIONS, mixture_of
from dominie.models.router_init import NORM, drawn_gates
from dominie.models.spec import Model
from dominie.models.weight_writer import write_weights
from dominie.models.weights import UNUSED, Weights, copy_configuration, open_weights

_FEED_FORWARD = re.compile(r"(?P<layer>.*layers\.(?P<number>\d+)\.)mlp\.(?P<kind>\w+)\.weight")


@dataclass(frozen=True, kw_only=True)
class Upcycle:
    """A dense model as a mixture of experts; docs/moe.md compares the ways to make them differ.

    With `noise` and `reset` at 0 and no siblings, experts begin as copies, and the mixture computes
    what the dense model does, whatever the gate.

    Attributes:
        model: the dense model, which gives everything but further experts.
        siblings: models fine-tuned from it, whose feed-forward layers are the experts after the
            first; if they are fewer, experts take turns.
        experts: how many there are.
        experts_per_token: how many each token is sent to.
        noise: deviation of noise added to each expert's weights, in units of each weight's own;
            the noises of all experts sum to zero, so that their mean is what it was.
        reset: share of each expert's intermediate dimension that is drawn again with the mean and
            deviation of what it replaces (Drop-Upcycling, Nakamura et al. 2025).
        gate: `zeros`; `random` directions; or `hidden_states`, the centres that k-means finds among
            the dense model's own feed-forward inputs.
        gate_scale: deviation of the router's logits over tokens, for a gate that is not zeros.
        source: of the recipe's data, whose conversations `hidden_states` reads.
        tokens: how many of its tokens.
        seed: of noise, resets and gate.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid", "strict": True}
    model: ModelName
    siblings: list[ModelName] = field(default_factory=list)
    experts: int = 2
    experts_per_token: int = 2
    noise: float = 0.0
    reset: float = 0.0
    gate: Literal["zeros", "random", "hidden_states"] = "random"
    gate_scale: float = 1.0
    source: SourceName | None = None
    tokens: int = 4096
    seed: int = 0

    def __post_init__(self) -> None:
        if self.experts < 2:
            raise ValueError(f"a mixture needs at least 2 experts, got {self.experts}")
        if not 1 <= self.experts_per_token <= self.experts:
            raise ValueError(
                f"experts_per_token must be from 1 to {self.experts}, the experts there are, "
                f"got {self.experts_per_token}"
            )
        if len(self.siblings) >= self.experts:
            raise ValueError(
                f"{len(self.siblings)} siblings beside the model need "
                f"{len(self.siblings) + 1} experts, got {self.experts}"
            )
        if len({self.model, *self.siblings}) <= len(self.siblings):
            raise ValueError("siblings names a model twice, or the model itself")
        if not 0.0 <= self.noise < float("inf"):
            raise ValueError(f"noise must be finite and not negative, got {self.noise}")
        if not 0.0 <= self.reset <= 1.0:
            raise ValueError(f"reset must be from 0 to 1, got {self.reset}")
        if not 0.0 < self.gate_scale < float("inf"):
            raise ValueError(f"gate_scale must be positive and finite, got {self.gate_scale}")
        if (self.source is not None) != (self.gate == "hidden_states"):
            raise ValueError(
                "gate hidden_states needs a source to read"
                if self.source is None
                else f"gate {self.gate} reads no source"
            )
        if self.tokens < self.experts:
            raise ValueError(f"tokens must be at least {self.experts}, got {self.tokens}")
        if self.seed < 0:
            raise ValueError(f"seed must not be negative, got {self.seed}")

    @property
    def sources(self) -> list[str]:
        """Every model that is read; the first gives configuration and tokenizer."""
        return [self.model, *self.siblings]

    @property
    def separates(self) -> bool:
        """Whether the experts begin unequal, or get unequal gradients."""
        return bool(self.siblings or self.noise or self.reset or self.gate != "zeros")


@dataclass(frozen=True)
class Planned:
    """A tensor of the mixture: what it will be, without storage, and how it is made."""

    shape: Tensor
    made: Callable[[], Tensor]


def upcycle_model(
    upcycle: Upcycle, models: Mapping[str, Model], folder: Path, *, rows: Sequence[Any] = ()
) -> int:
    """Write the mixture's weights and configuration.

    Args:
        upcycle: which models, and how their experts differ.
        models: what its names stand for.
        folder: an empty or missing folder.
        rows: tokenised conversations of its source, for gates of hidden states.

    Returns:
        The parameters of the mixture.

    Raises:
        InputError: an architecture without a mixture, siblings of another shape, models that cannot
            be read, or that are not finite or zeros.
    """
    config = load_config(models[upcycle.model])
    mixture = mixture_of(config, where=upcycle.model)
    with contextlib.ExitStack() as stack:
        opened = [stack.enter_context(open_weights(models[name])) for name in upcycle.sources]
        _check_names(opened[0], config, where=upcycle.model)
        for name, weights in zip(upcycle.siblings, opened[1:], strict=True):
            _check_sibling(opened[0], weights, where=name, model=upcycle.model)
        gates = drawn_gates(upcycle, config, opened[0], rows)
        plan = planned_tensors(upcycle, config, opened, gates)
        shapes = {name: tensor.shape for name, tensor in plan.items()}
        read = dict(zip(upcycle.sources, opened, strict=True))
        write_weights(folder, shapes, lambda name: plan[name].made(), read)
        copy_configuration(opened[0].folder, folder)
        mixture.configuration(
            config, experts=upcycle.experts, experts_per_token=upcycle.experts_per_token
        ).save_pretrained(folder)
    return sum(shape.numel() for shape in shapes.values())


def planned_tensors(
    upcycle: Upcycle, config: Any, opened: Sequence[Weights], gates: Mapping[int, Tensor]
) -> dict[str, Planned]:
    """Every tensor of the mixture by its name on disk; nothing is computed yet.

    Args:
        upcycle: the settings.
        config: of the dense model.
        opened: the dense model's tensors, then the siblings'.
        gates: [experts, hidden] weights of the router by layer; a layer without gets zeros.
    """
    mixture, dense = mixture_of(config, where=upcycle.model), opened[0]
    plan: dict[str, Planned] = {}
    for name, shape in dense.shapes.items():
        found = _FEED_FORWARD.fullmatch(name)
        if name.endswith(UNUSED):
            continue
        if found is None:
            plan[name] = Planned(shape, partial(dense.__getitem__, name))
            continue
        block, kind = f"{found['layer']}{mixture.block}", found["kind"]
        own_name = mixture.projections[PROJECTIONS.index(kind)]
        for expert in range(upcycle.experts):
            plan[f"{block}.experts.{expert}.{own_name}.weight"] = Planned(
                shape, partial(_expert, upcycle, opened, expert, name, kind)
            )
        if kind == PROJECTIONS[0]:
            gate = shape.new_empty((upcycle.experts, shape.shape[1]))
            drawn = gates.get(int(found["number"]))
            plan[f"{block}.gate.weight"] = Planned(gate, partial(_gate, gate, drawn))
        if mixture.shared:
            plan |= _shared(block, kind, shape, mixture.shared_width(config), upcycle.seed)
    return plan


def _expert(
    upcycle: Upcycle, opened: Sequence[Weights], expert: int, name: str, kind: str
) -> Tensor:
    """A projection of an expert: that of the model whose turn it is, made to differ."""
    weight, dtype = opened[expert % len(opened)][name], opened[0].shapes[name].dtype
    if not (upcycle.noise or upcycle.reset):
        return weight.to(dtype)
    changed = weight.float()
    if upcycle.reset:
        changed = _reset(changed, kind, upcycle, expert, name)
    if upcycle.noise:
        changed = changed + upcycle.noise * weight.float().std() * _noise(
            upcycle, expert, name, weight
        )
    return changed.to(dtype)


def _noise(upcycle: Upcycle, expert: int, name: str, weight: Tensor) -> Tensor:
    """Noise of unit deviation; that of all experts sums to zero.

    Independent noises less their mean are that, and (1 − 1/N)^½ too small.
    """
    count = upcycle.experts
    own, mean = torch.zeros(()), torch.zeros(weight.shape)
    for other in range(count):
        drawn = torch.randn(weight.shape, generator=_generator(upcycle.seed, name, other, "noise"))
        mean.add_(drawn, alpha=1 / count)
        own = drawn if other == expert else own
    own -= mean
    return own.mul_(math.sqrt(count / (count - 1)))


def _reset(weight: Tensor, kind: str, upcycle: Upcycle, expert: int, name: str) -> Tensor:
    """The weight with some of the intermediate dimension drawn again, the same in all three."""
    intermediate = 1 if kind == PROJECTIONS[2] else 0
    width = weight.shape[intermediate]
    layer = name.partition(".mlp.")[0]
    order = torch.randperm(width, generator=_generator(upcycle.seed, layer, expert, "reset"))
    lost = order[: round(upcycle.reset * width)]
    if not len(lost):
        return weight
    old = weight.index_select(intermediate, lost)
    drawn = torch.randn(old.shape, generator=_generator(upcycle.seed, name, expert, "reset"))
    return weight.index_copy(intermediate, lost, old.mean() + old.std() * drawn)


def _gate(shape: Tensor, drawn: Tensor | None) -> Tensor:
    gate = torch.zeros(shape.shape) if drawn is None else drawn
    return gate.to(shape.dtype)


def _shared(block: str, kind: str, shape: Tensor, width: int, seed: int) -> dict[str, Planned]:
    """A projection of the shared expert, whose output is zero: so is all of its last one."""
    name = f"{block}.shared_expert.{kind}.weight"
    size = shape.shape[1] if kind != PROJECTIONS[2] else shape.shape[0]
    if kind == PROJECTIONS[2]:
        narrow = shape.new_empty((size, width))
        gate = shape.new_empty((1, size))
        return {
            name: Planned(narrow, partial(_gate, narrow, None)),
            f"{block}.shared_expert_gate.weight": Planned(gate, partial(_gate, gate, None)),
        }
    narrow = shape.new_empty((width, size))

    def drawn() -> Tensor:
        noise = torch.randn(narrow.shape, generator=_generator(seed, name))
        return noise.div_(math.sqrt(size)).to(narrow.dtype)

    return {name: Planned(narrow, drawn)}


def _generator(seed: int, *key: object) -> torch.Generator:
    """Random numbers of their own for each tensor, in whichever order they are made."""
    digest = hashlib.blake2b(repr((seed, *key)).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)


def _check_names(weights: Weights, config: Any, *, where: str) -> None:
    """Refuse a model whose layers are not where its family has them."""
    for layer in range(config.num_hidden_layers):
        prefix = f"model.layers.{layer}"
        for name in (NORM.format(layer), *(f"{prefix}.mlp.{kind}.weight" for kind in PROJECTIONS)):
            if name not in weights.shapes:
                raise InputError(
                    "the model's layers are not where its family has them",
                    where=where,
                    expected=name,
                    found=", ".join(list(weights.shapes)[:2]),
                    do="save it again with transformers' save_pretrained",
                )


def _check_sibling(model_weights: Weights, sibling: Weights, *, where: str, model: str) -> None:
    """Refuse a sibling whose feed-forward layers would not fit in."""
    for name, shape in model_weights.shapes.items():
        found = sibling.shapes.get(name)
        if _FEED_FORWARD.fullmatch(name) and (found is None or found.shape != shape.shape):
            raise InputError(
                "a sibling of another shape cannot lend experts",
                where=where,
                expected=f"{name} as in {model}: {list(shape.shape)}",
                found="no such tensor" if found is None else str(list(found.shape)),
                do="name models that were trained from one model",
            )
