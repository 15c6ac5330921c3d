"""What a model's forward passes tell of the weight of its parts, and its loss on rows."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dominie.core.errors import InputError
from dominie.data.batch import Batch
from dominie.losses.vocabulary import vocabulary_losses
from dominie.models.head import causal_lm, decoder, output_head


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
