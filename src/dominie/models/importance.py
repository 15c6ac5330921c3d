"""What a model's forward passes tell of the weight of its parts, and its loss on rows."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dominie.core.errors import InputError
from dominie.data.batch import Batch
from dominie.losses.vocabulary import vocabulary_losses
from dominie.models.head import causal_lm, decoder, output_head, text_config
from dominie.models.info import info_of
from dominie.models.moe import Routers


@torch.no_grad()
def block_angles(
    model: nn.Module, batches: Iterable[Batch], starts: Sequence[int], length: int
) -> dict[int, float]:
    """By its first layer, how far each block of layers turns a token's hidden state.

    The mean over tokens of arccos(cos(h_start, h_start+length)) / π, from 0 to 1, between what
    enters the block and what enters the layer after it (Gromov et al. 2024, arXiv 2403.17887,
    equation 7, over all tokens of a conversation).

    Args:
        model: in evaluation mode, on the device that it runs on.
        batches: of at least one conversation, one to a row.
        starts: numbers of layers; each block ends before the last layer does.
        length: layers of a block.

    Raises:
        InputError: hidden states that are not finite.
    """
    sums = dict.fromkeys(starts, 0.0)
    entered: dict[int, Tensor] = {}
    tokens = 0
    real = torch.zeros(0)

    def seen(layer: int, states: Tensor) -> None:
        if layer in sums:
            entered[layer] = states[real].float()
        if (before := entered.pop(layer - length, None)) is not None:
            cosine = nn.functional.cosine_similarity(before, states[real].float(), dim=-1)
            sums[layer - length] += float(cosine.clamp(-1.0, 1.0).arccos().double().sum())

    with _layer_inputs(model, {*starts, *(start + length for start in starts)}, seen):
        for batch in _on_device(model, batches):
            real = batch.source_ids >= 0
            tokens += int(real.sum())
            decoder(model)(**batch.model_inputs())
    angles = {start: total / tokens / math.pi for start, total in sums.items()}
    if not all(map(math.isfinite, angles.values())):
        raise InputError(
            "the model's hidden states are not finite",
            where=str(getattr(causal_lm(model).config, "_name_or_path", "")),
            do="check its weights, and the dtype they were trained in",
        )
    return angles


_Add = Callable[[str, Any, Tensor], None]


@dataclass(frozen=True, kw_only=True)
class PartScores:
    """How much the parts of a model do on some rows; of parts that nobody asked for None.

    Attributes:
        key_heads: [layers, key heads].
        neurons: [layers, neurons of a feed-forward layer].
        experts: [layers, experts] tokens that were sent to each.
        channels: [channels of the hidden state].
    """

    key_heads: Tensor | None = None
    neurons: Tensor | None = None
    experts: Tensor | None = None
    channels: Tensor | None = None


def strongest(scores: Tensor, count: int) -> Tensor:
    """The numbers of the `count` highest scores of the last dimension, ascending; first wins."""
    order = scores.argsort(dim=-1, descending=True, stable=True)
    return order[..., :count].sort(dim=-1).values


@torch.no_grad()
def part_scores(model: nn.Module, batches: Iterable[Batch], parts: Collection[str]) -> PartScores:
    """Score heads, neurons, channels and experts by forward passes.

    A head by the norm of its output, a neuron and a channel by the size of its activation (a
    channel by those after every norm before attention and feed-forward layers): the mean over the
    tokens of a conversation, then the root of the sum of squares over conversations (Muralidharan
    et al. 2024, arXiv 2407.14679, section 2.2). Heads that share a key head are scored together,
    channels over all layers.

    Args:
        model: in evaluation mode, on the device that it runs on.
        batches: of at least one conversation, one to a row.
        parts: some of `heads`, `intermediate_size`, `hidden_size` and `experts`.
    """
    sums: dict[str, dict[Any, Tensor]] = {"heads": {}, "neurons": {}, "channels": {}, "experts": {}}
    real = torch.zeros(0)

    def add(part: str, place: Any, activations: Tensor) -> None:
        """Add [B, L, n] activations; padding does not count."""
        of_token = (real / real.sum(1, keepdim=True)).to(torch.float32)
        means = torch.einsum("bl,bln->bn", of_token, activations.float().abs())
        found = means.double().square().sum(0).cpu()
        sums[part][place] = sums[part].get(place, 0.0) + found

    info, routers = info_of(text_config(model)), Routers(model)
    size, keys = info.need("head_size", use="scoring"), info.need("key_heads", use="scoring")
    with contextlib.ExitStack() as stack:
        stack.callback(routers.detach)
        for number, layer in enumerate(decoder(model).layers):
            for hook in _attached(layer, number, parts, size, add):
                stack.callback(hook.remove)
        for batch in _on_device(model, batches):
            real = batch.source_ids >= 0
            with routers.recorded() as routing:
                decoder(model)(**batch.model_inputs())
            for number, each in enumerate(routing if "experts" in parts else ()):
                chosen = each.chosen[real.flatten()].flatten().cpu()
                counts = torch.bincount(chosen, minlength=each.logits.shape[-1])
                sums["experts"][number] = sums["experts"].get(number, 0) + counts
    found = {part: torch.stack(list(of.values())) for part, of in sums.items() if of}
    if "heads" in found:
        found["key_heads"] = torch.unflatten(found.pop("heads"), -1, (keys, -1)).sum(-1)
    scores = {part: each if part == "experts" else each.sqrt() for part, each in found.items()}
    if "channels" in scores:
        scores["channels"] = scores["channels"].sum(0)
    return PartScores(**scores)


def _attached(
    layer: Any, number: int, parts: Collection[str], head_size: int, add: _Add
) -> Iterator[Any]:
    """Have a layer's activations added whenever it runs; the hooks."""
    if "heads" in parts:
        yield layer.self_attn.o_proj.register_forward_pre_hook(
            lambda _, given: add(
                "heads", number, given[0].unflatten(-1, (-1, head_size)).norm(dim=-1)
            )
        )
    if "intermediate_size" in parts:
        yield layer.mlp.down_proj.register_forward_pre_hook(
            lambda _, given: add("neurons", number, given[0])
        )
    if "hidden_size" in parts:
        for norm in ("input_layernorm", "post_attention_layernorm"):
            yield getattr(layer, norm).register_forward_hook(
                lambda _, __, output, norm=norm: add("channels", (number, norm), output)
            )


@torch.no_grad()
def next_token_loss(model: nn.Module, batches: Iterable[Batch]) -> float:
    """The mean loss of a model on the supervised tokens of some rows, in nats."""
    total, tokens = 0.0, 0
    for batch in _on_device(model, batches):
        states = decoder(model)(**batch.model_inputs()).last_hidden_state
        hidden = states.flatten(0, 1)[batch.positions]
        labels = batch.labels.flatten()[batch.positions]
        losses = vocabulary_losses(hidden, output_head(model), labels=labels)
        total += float(losses.next_token.double())
        tokens += len(labels)
    return total / max(tokens, 1)


@contextlib.contextmanager
def _layer_inputs(model: nn.Module, layers: Iterable[int], seen: Any) -> Iterator[None]:
    """Within, `seen(number, hidden states)` is called before each of these layers runs."""
    with contextlib.ExitStack() as stack:
        for number in sorted(layers):
            hook = (
                decoder(model)
                .layers[number]
                .register_forward_pre_hook(
                    lambda _, given, named, number=number: seen(
                        number, given[0] if given else named["hidden_states"]
                    ),
                    with_kwargs=True,
                )
            )
            stack.callback(hook.remove)
        yield


def _on_device(model: nn.Module, batches: Iterable[Batch]) -> Iterator[Batch]:
    device = causal_lm(model).device
    return (batch.to(device) for batch in batches)
