"""The output head of a causal language model: as losses take it, and untied under adapters."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from dominie.core.errors import InputError
from dominie.data.batch import Padding
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


def padding_for(*models: nn.Module) -> Padding:
    """How long rows are made that all of these models read, on the device of the first."""
    contexts = [getattr(text_config(m), "max_position_embeddings", None) for m in models]
    bound = min((each for each in contexts if each), default=None)
    return Padding.on(causal_lm(models[0]).device, bound)


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


def untie(model: Any, *, where: str) -> bool:
    """Give the head a weight of its own if adapters change it or the embedding it is tied to.

    An adapter learns on one of the two, or on each something else, which one weight cannot hold:
    merged into it, both would change.

    Args:
        model: under peft adapters, before any is merged.
        where: the model's name for a message.

    Returns:
        Whether the two were tied and are not any more.

    Raises:
        InputError: adapters change weights that other modules share.
    """
    inner = causal_lm(model)
    head, table = (
        _without_adapters(module)
        for module in (inner.get_output_embeddings(), inner.get_input_embeddings())
    )
    shared = _shared_under_adapters(inner)
    if shared.keys() - {id(head.weight)} or (shared and head.weight is not table.weight):
        raise InputError(
            "LoRA cannot be applied to weights that several modules share",
            where=where,
            expected="adapters on modules with weights of their own",
            found=", ".join(next(iter(shared.values()))[:3]),
            do="leave them out of train.lora.target_modules and modules_to_save",
        )
    if not shared:
        return False
    head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=False)
    for config in (inner.config, inner.config.get_text_config()):
        config.tie_word_embeddings = False
    inner.all_tied_weights_keys = inner.get_expanded_tied_weights_keys(all_submodels=True)
    return True


def _without_adapters(module: Any) -> Any:
    """A module without the adapters around it."""
    for name in ("base_layer", "original_module"):
        module = getattr(module, name, module)
    return module


def _shared_under_adapters(model: nn.Module) -> dict[int, list[str]]:
    """By identity, weights of several modules of which adapters change one; the modules' names."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import ModulesToSaveWrapper

    adapted = set()
    owners: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        if isinstance(module, BaseTunerLayer | ModulesToSaveWrapper):
            bare = _without_adapters(module)
            adapted |= {id(weight) for weight in bare.parameters()}
        for weight in module.parameters(recurse=False):
            owners.setdefault(id(weight), []).append(name)
    return {key: names for key, names in owners.items() if key in adapted and len(names) > 1}
