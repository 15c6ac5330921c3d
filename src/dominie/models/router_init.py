"""Initial routers of an upcycled mixture of experts."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from dominie.core.errors import InputError
from dominie.data.batch import collate
from dominie.models.weights import Weights

if TYPE_CHECKING:
    from dominie.models.upcycling import Upcycle

#: What scales the input of a layer's feed-forward, by the layer's number.
NORM = "model.layers.{}.post_attention_layernorm.weight"
_LLOYD_STEPS = 30


def drawn_gates(
    upcycle: Upcycle, config: Any, weights: Weights, rows: Sequence[Any]
) -> dict[int, Tensor]:
    """[experts, hidden] fp32 weights of each layer's router, whose logits deviate by `gate_scale`.

    Args:
        upcycle: which kind; zeros are no entry.
        config: of the dense model.
        weights: of the dense model.
        rows: tokenised conversations, for `hidden_states`.
    """
    if upcycle.gate == "random":
        layers = range(config.num_hidden_layers)
        return {layer: _random_gate(upcycle, weights, layer) for layer in layers}
    if upcycle.gate == "hidden_states":
        return _hidden_state_gates(upcycle, config, weights, rows)
    return {}


def _random_gate(upcycle: Upcycle, weights: Weights, layer: int) -> Tensor:
    """Random directions. What a router sees is normalised and scaled, which gives its size."""
    scale = weights[NORM.format(layer)].float()
    generator = torch.Generator().manual_seed(upcycle.seed * 100_003 + layer)
    drawn = torch.randn((upcycle.experts, len(scale)), generator=generator)
    size: Tensor = scale.norm()
    return drawn * (upcycle.gate_scale / size)


@torch.no_grad()
def _hidden_state_gates(
    upcycle: Upcycle, config: Any, weights: Weights, rows: Sequence[Any]
) -> dict[int, Tensor]:
    """Centres of what each layer's feed-forward sees, found in one pass of the dense model.

    The model is read a module at a time, while the pass goes through it.
    """
    batch = collate([(0, row) for row in _some(rows, upcycle)])
    real = batch.source_ids >= 0
    gates: dict[int, Tensor] = {}
    model = _without_weights(config)
    decoder = model.get_decoder()
    with contextlib.ExitStack() as stack:
        stack.enter_context(_read_when_needed(model, weights))

        def seen(number: int, states: Tensor) -> None:
            gates[number] = centre_gate(
                states[real.to(states.device)].cpu(),
                upcycle.experts,
                scale=upcycle.gate_scale,
                seed=upcycle.seed * 100_003 + number,
            )

        for number, layer in enumerate(decoder.layers):
            hook = layer.mlp.register_forward_pre_hook(
                lambda _, inputs, number=number: seen(number, inputs[0])
            )
            stack.callback(hook.remove)
        decoder(**batch.to(_device()).model_inputs())
    return gates


def centre_gate(states: Tensor, experts: int, *, scale: float, seed: int) -> Tensor:
    """[experts, hidden] directions from the mean of the states to the centres of their clusters.

    A router has no bias, so each direction is made orthogonal to the mean: a token that is like
    the mean prefers no expert. Scaled so that logits deviate by `scale` over the states.

    Args:
        states: [n, hidden].
        experts: clusters to find (k-means, k-means++ beginnings).
        scale: deviation of the logits.
        seed: of the beginnings.
    """
    states = states.double()
    mean = states.mean(0)
    centred = states - mean
    directions = _centres(centred, experts, torch.Generator().manual_seed(seed))
    directions = directions - directions.mean(0)
    axis = mean / mean.norm().clamp(min=1e-12)
    directions = directions - torch.outer(directions @ axis, axis)
    deviation = (states @ directions.T).std().clamp(min=1e-12)
    return (directions * (scale / deviation)).float()


def _centres(points: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """[count, hidden] of k-means."""
    first = torch.randint(len(points), (1,), generator=generator)
    centres = points[first]
    for _ in range(count - 1):
        distance = torch.cdist(points, centres).amin(1) ** 2
        likely = distance if bool(distance.sum() > 0) else torch.ones_like(distance)
        chosen = torch.multinomial(likely, 1, generator=generator)
        centres = torch.cat([centres, points[chosen]])
    for _ in range(_LLOYD_STEPS):
        nearest = torch.cdist(points, centres).argmin(1)
        members = nn.functional.one_hot(nearest, count).to(points.dtype)
        counts = members.sum(0)[:, None]
        centres = torch.where(counts > 0, members.T @ points / counts.clamp(min=1), centres)
    return centres


def _some(rows: Sequence[Any], upcycle: Upcycle) -> list[Any]:
    """Conversations drawn at random until they hold the tokens that are asked for."""
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(upcycle.seed))
    chosen, tokens = [], 0
    for index in order.tolist():
        if tokens >= upcycle.tokens:
            break
        chosen.append(rows[index])
        tokens += len(rows[index].input_ids)
    if tokens < upcycle.experts:
        raise InputError(
            "the source has nothing to find gates by",
            where=str(upcycle.source),
            expected="conversations to train on",
        )
    return chosen


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _without_weights(config: Any) -> Any:
    """The model with parameters that hold no storage; its rotary tables are real."""
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM

    with init_empty_weights(include_buffers=False):
        return AutoModelForCausalLM.from_config(config).eval()


@contextlib.contextmanager
def _read_when_needed(model: nn.Module, weights: Weights) -> Iterator[None]:
    """Within, each module reads its parameters before it runs, in fp32, and forgets them after."""
    device = _device()
    with contextlib.ExitStack() as stack:
        for name, module in model.named_modules():
            for buffer, tensor in module.named_buffers(recurse=False):
                module.register_buffer(buffer, tensor.to(device), persistent=False)
            empty = dict(module.named_parameters(recurse=False))
            if not empty:
                continue

            def read(
                module: nn.Module, _: Any, name: str = name, empty: dict[str, nn.Parameter] = empty
            ) -> None:
                for own in empty:
                    tensor = weights[f"{name}.{own}"].to(device, torch.float32)
                    module._parameters[own] = nn.Parameter(tensor, requires_grad=False)

            def forget(
                module: nn.Module, _: Any, __: Any, empty: dict[str, nn.Parameter] = empty
            ) -> None:
                module._parameters.update(empty)

            stack.callback(module.register_forward_pre_hook(read).remove)
            stack.callback(module.register_forward_hook(forget).remove)
        yield
