"""Hooks into a model's attention: a registered function runs the stock kernel and calls back.

transformers hands every attention call to a function looked up by name in `AttentionInterface`,
and builds its masks by the same name in `AttentionMaskInterface`. For every stock implementation
a second name is registered here, which runs the stock function and then calls the hooks of the
attention module at hand with query and key. Hooks are bound to modules, never to a phase, so
student and teacher may be of one class, or even one model.
"""

from __future__ import annotations

import functools
import sys
from typing import TYPE_CHECKING, Any, Protocol
from weakref import WeakKeyDictionary

import torch
from torch.nn.functional import pad

from dominie.core.errors import InputError
from dominie.losses.attention_rows import Projections
from dominie.models.info import ModelInfo
from dominie.models.packed_attention import PACKED, register_packed_attention

if TYPE_CHECKING:
    from collections.abc import Callable, Collection

    from torch import Tensor, nn

# The stock implementations, and the name of each with hooks. A name with "flash" in it would
# make transformers import a flash attention package.
_NAMES = {
    "eager": "dominie_over_eager",
    "sdpa": "dominie_over_sdpa",
    PACKED: "dominie_over_packed",
    "flex_attention": "dominie_over_flex",
    "flash_attention_2": "dominie_over_fa2",
    "flash_attention_3": "dominie_over_fa3",
    "flash_attention_4": "dominie_over_fa4",
}
_SOFTMAX_LAYERS = {"full_attention", "sliding_attention", "hybrid", "hybrid_sliding"}
_NOT_SOFTMAX = {"doge": "its masks are learned and added to the scores"}
_ALTERNATIVE = "set attention: 0, or map only layers of plain softmax attention (layers: […])"


class AttentionHook(Protocol):
    """Called after every attention call of the layers it is attached to."""

    def on_attention(self, layer: int, projections: Projections) -> None:
        """Take query and key of ``layer``, whose stock attention has just run."""


_hooks: WeakKeyDictionary[nn.Module, list[AttentionHook]] = WeakKeyDictionary()


def attach_hook(model: nn.Module, layers: Collection[int], hook: AttentionHook) -> None:
    """Call a hook after every attention call of some layers of ``model`` from now on.

    Args:
        model: a causal language model of transformers; adapters may be wrapped around it.
        layers: numbers of the layers, from 0.
        hook: that is called.

    Raises:
        InputError: the model has no such layer, or its attention is not a plain causal softmax.
    """
    _register()
    modules = _attention_modules(model)
    for layer in layers:
        _refuse_unsuitable(model, layer, modules.get(layer), len(modules))
    for config in _configs(model, modules):
        stock = config._attn_implementation or "eager"
        if stock not in _NAMES and stock not in _NAMES.values():
            raise InputError(
                f"attention implementation {stock!r} takes no hooks",
                where=_name(model),
                expected=", ".join(name for name in _NAMES if name != PACKED),
                do="load the model with attn_implementation: sdpa",
            )
        config._attn_implementation = _NAMES.get(stock, stock)
    for layer in layers:
        _hooks.setdefault(modules[layer], []).append(hook)


def check_attention(model_info: ModelInfo, layers: Collection[int]) -> None:
    """Refuse, before any weights are loaded, layers that `attach_hook` would refuse.

    Args:
        model_info: what is known of the model.
        layers: numbers of the layers that are to be compared.

    Raises:
        InputError: the model has no such layer, its attention is not a plain causal softmax, or
            neither can be known.
    """
    from transformers import AutoModelForCausalLM

    config = model_info.need("config", use="comparing attention")
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    modules = _attention_modules(model)
    for layer in layers:
        _refuse_unsuitable(model, layer, modules.get(layer), len(modules))


def detach_hook(model: nn.Module, hook: AttentionHook) -> None:
    """Undo `attach_hook`; a model without hooks has its stock attention back."""
    modules = _attention_modules(model)
    for module in modules.values():
        if hook in _hooks.get(module, []):
            _hooks[module].remove(hook)
    if not any(_hooks.get(module) for module in modules.values()):
        stock_of = {name: stock for stock, name in _NAMES.items()}
        for config in _configs(model, modules):
            name = config._attn_implementation
            config._attn_implementation = stock_of.get(name, name)


def hooks_of(model: nn.Module) -> list[AttentionHook]:
    """The hooks of all layers of ``model``, once each."""
    found: list[AttentionHook] = []
    for module in _attention_modules(model).values():
        found += [each for each in _hooks.get(module, []) if each not in found]
    return found


def _call_hooks(module: nn.Module, query: Tensor, key: Tensor, kwargs: dict[str, Any]) -> None:
    """Call the hooks of a module."""
    _refuse_unusual(module, kwargs)
    scale = kwargs.get("scaling")
    projections = Projections(
        query,
        key,
        query.shape[-1] ** -0.5 if scale is None else float(scale),
        kwargs.get("sliding_window", getattr(module, "sliding_window", None)),
    )
    for hook in tuple(_hooks[module]):
        hook.on_attention(int(module.layer_idx), projections)  # type: ignore[arg-type]


def _as_attended(projection: Tensor) -> Tensor:
    """Query or key in the precision that the stock attention reads it in.

    Under autocast rotary embedding leaves float32, which every stock kernel rounds first. Rounded
    here, both share one tensor, and a fused kernel is spared float32, of which tensor cores take
    three products for one.
    """
    device = projection.device.type
    if projection.dtype != torch.float32 or not torch.is_autocast_enabled(device):
        return projection
    return projection.to(torch.get_autocast_dtype(device))


def _with_hooks(stock: str) -> Callable[..., tuple[Tensor, Tensor | None]]:
    """The function that runs attention implementation ``stock``, then the hooks."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    # Not a decorator, which would load the compiler.
    call_hooks = torch.compiler.disable(_call_hooks)  # type: ignore[no-untyped-call]

    def attention(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Any,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        if stock == "eager":  # every model file has its own
            function = sys.modules[type(module).__module__].eager_attention_forward
        else:
            function = ALL_ATTENTION_FUNCTIONS[stock]
        query, key = _as_attended(query), _as_attended(key)
        width = value.shape[-1]
        if stock.startswith("flash"):  # one head size for all; models pad by the stock name alone
            value = pad(value, (0, query.shape[-1] - width))
        output, weights = function(module, query, key, value, attention_mask, **kwargs)
        if _hooks.get(module):
            call_hooks(module, query, key, kwargs)
        return output[..., :width], weights

    return attention


@functools.cache
def _register() -> None:
    """Give transformers the functions with hooks; here, as its modules of models load slowly."""
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface
    from transformers.modeling_utils import AttentionInterface

    register_packed_attention()
    for stock, hooked_name in _NAMES.items():
        AttentionInterface.register(hooked_name, _with_hooks(stock))
        AttentionMaskInterface.register(hooked_name, ALL_MASK_ATTENTION_FUNCTIONS[stock])


def _decoder(model: nn.Module) -> nn.Module:
    """The language model proper inside adapters, heads and multimodal wrappers."""
    from transformers import PreTrainedModel

    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            decoder: nn.Module = module.get_decoder()
            return decoder
    return model


def _attention_modules(model: nn.Module) -> dict[int, nn.Module]:
    """The self-attention module of every layer of the decoder that has one."""
    modules: dict[int, nn.Module] = {}
    for module in _decoder(model).modules():
        layer = getattr(module, "layer_idx", None)
        if isinstance(layer, int) and "Attention" in type(module).__name__:
            modules.setdefault(layer, module)  # the outermost, if one wraps another
    return modules


def _configs(model: nn.Module, modules: dict[int, nn.Module]) -> list[Any]:
    """The configurations that name the implementation: the layers' and, for masks, the model's."""
    from transformers import PreTrainedModel

    found = {}
    for module in (*modules.values(), *model.modules()):
        config = getattr(module, "config", None)
        if hasattr(config, "_attn_implementation") and (
            isinstance(module, PreTrainedModel) or module in modules.values()
        ):
            found[id(config)] = config
    return list(found.values())


def _refuse_unsuitable(model: nn.Module, layer: int, module: nn.Module | None, depth: int) -> None:
    """Refuse a layer whose attention is known not to be a plain causal softmax."""
    config = getattr(module, "config", None) or getattr(_decoder(model), "config", None)
    kinds = getattr(config, "layer_types", None)
    kind = kinds[layer] if kinds and layer < len(kinds) else None
    fault = None
    if kind is not None and kind not in _SOFTMAX_LAYERS:
        fault = f"{kind.replace('_', ' ')} is not a plain softmax over the keys before a row"
    elif module is None:
        fault = f"it has no attention layer {layer} ({depth} have attention)"
    elif config is not None and config.model_type in _NOT_SOFTMAX:
        fault = _NOT_SOFTMAX[config.model_type]
    elif getattr(config, "attn_logit_softcapping", None) is not None:
        fault = "soft-capped attention scores are not a plain softmax"
    elif any("sink" in name for name, _ in module.named_parameters()):
        fault = "attention with sinks is not a plain softmax over the keys"
    elif getattr(config, "index_topk", None) is not None:
        fault = "indexed (sparse) attention is not a plain softmax over the keys before a row"
    elif getattr(module, "is_causal", True) is False:
        fault = "its attention is not causal"
    elif "ALL_ATTENTION_FUNCTIONS" not in vars(sys.modules[type(module).__module__]):
        fault = "its attention does not go through transformers' AttentionInterface"
    if fault:
        raise InputError(
            f"attention distillation cannot be used: {fault}",
            where=f"{_name(model)}, layer {layer}",
            do=_ALTERNATIVE,
        )


def _refuse_unusual(module: nn.Module, kwargs: dict[str, Any]) -> None:
    """Refuse a call that asks for more than a plain causal softmax."""
    for meaning, asked_for in (
        ("soft-capped scores", kwargs.get("softcap") is not None),
        ("attention sinks", kwargs.get("s_aux") is not None),
        ("a position bias", kwargs.get("position_bias") is not None),
        ("attention that is not causal", kwargs.get("is_causal") is False),
    ):
        if asked_for:
            raise InputError(
                f"attention distillation cannot be used with {meaning}",
                where=f"{type(module).__name__}, layer {module.layer_idx}",
                do=_ALTERNATIVE,
            )


def _name(model: nn.Module) -> str:
    """How the user knows a model: its path, else its class."""
    path = getattr(getattr(model, "config", None), "_name_or_path", None)
    return path or type(model).__name__
