"""The output projection of a causal language model as the vocabulary losses take it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from dominie.core.errors import InputError
from dominie.losses.vocabulary import Head


def causal_lm(model: nn.Module) -> Any:
    """The transformers model inside adapters and wrappers."""
    inner: Any = model
    while hasattr(inner, "module"):
        inner = inner.module
    return (
        inner.get_base_model()
        if hasattr(inner, "peft_config") and hasattr(inner, "get_base_model")
        else inner
    )


def text_config(model: nn.Module) -> Any:
    """The configuration of the language part."""
    return causal_lm(model).config.get_text_config()


def decoder(model: nn.Module) -> Any:
    """The transformer without its head: token ids in, last hidden states out."""
    return causal_lm(model).get_decoder()


def output_head(model: nn.Module) -> Head:
    """The head with what its family applies after it: scale (Cohere, Granite), soft-cap (Gemma).

    With LoRA on the head, the weight is the sum of base and adapter, and differentiable in the
    adapter.
    """
    inner = causal_lm(model)
    projection = inner.get_output_embeddings()
    config = text_config(model)
    scale = float(getattr(config, "logit_scale", None) or 1.0) / float(
        getattr(config, "logits_scaling", None) or 1.0
    )
    return Head(
        weight=_effective_weight(projection),
        bias=getattr(projection, "bias", None),
        scale=scale,
        softcap=getattr(config, "final_logit_softcapping", None),
    )


def _effective_weight(projection: Any) -> Tensor:
    weight: Tensor = projection.weight
    if hasattr(projection, "get_delta_weight") and not projection.disable_adapters:
        for adapter in projection.active_adapters:
            if adapter in projection.lora_A:
                weight = weight + projection.get_delta_weight(adapter)
    return weight


@torch.no_grad()
def check_head(model: nn.Module, *, where: str) -> None:
    """Compare the head we read off the configuration with the model's own logits on three tokens.

    Raises:
        InputError: the family does something after its projection that we do not know of.
    """
    inner = causal_lm(model)
    training = inner.training
    inner.eval()
    ids = torch.arange(3, device=inner.device)[None] % text_config(model).vocab_size
    hidden = decoder(model)(input_ids=ids, use_cache=False).last_hidden_state
    theirs = inner(input_ids=ids, use_cache=False).logits.float()
    inner.train(training)
    head = output_head(model)
    ours = (
        torch.nn.functional.linear(hidden.to(head.weight.dtype), head.weight, head.bias).float()
        * head.scale
    )
    if head.softcap:
        ours = head.softcap * torch.tanh(ours / head.softcap)
    if not bool(theirs.isfinite().all()):
        raise InputError(
            "the model's logits are not finite",
            where=where,
            do="check its weights, and the dtype they were trained in",
        )
    close = (theirs - ours).abs().max() <= 1e-2 * theirs.abs().max().clamp(min=1.0)
    if ours.shape != theirs.shape or not bool(close):
        raise InputError(
            f"the head of {type(inner).__name__} does something its configuration does not say",
            where=where,
            expected="logits = softcap(scale · (hidden · weightᵀ + bias))",
            found=f"logits that differ by {float((theirs - ours).abs().max()):.3g}",
            do="use a family of docs/losses.md, or report this one",
        )
