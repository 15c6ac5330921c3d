"""Attention over packed rows, conversation by conversation, without a mask of [B, 1, L, L].

transformers tells packed conversations apart by a dense mask: L² elements a row, all L² scores
computed, and the keys copied for every query head. Here the lengths of the conversations take its
place, in the argument that every model file passes on to its attention whatever it holds: a
registered function attends within each of them. On CUDA all of a layer in one call
(`torch.nn.attention.varlen`), elsewhere in one stock call for each conversation: Σ l² scores, the
numbers those of the conversation in a row of its own.
"""

from __future__ import annotations

import functools
import inspect
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from torch.nn.functional import pad

from dominie.data.batch import Batch, to_device

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor, nn

#: Name of this attention in transformers. One with "flash" in it would make transformers import a
#: flash attention package; one that has no mask function would lose padding and windows.
PACKED = "dominie_packed"
#: What it takes the place of; the second is the first with hooks, see `attention_hooks`.
_NAMES = {"sdpa": PACKED, "dominie_over_sdpa": "dominie_over_packed"}
_KINDS = {"full_attention", "sliding_attention"}
#: Dtype of the lengths where a mask is expected: no mask is of whole numbers.
_LENGTHS = torch.int32
#: Positions of a row on a CPU from which on several calls are faster than one under a mask.
_LEAST = 256

_configs: WeakKeyDictionary[nn.Module, list[Any]] = WeakKeyDictionary()


def decoder_inputs(model: nn.Module, batch: Batch) -> dict[str, Any]:
    """What a model's decoder is called with on a batch.

    Packed rows come with the lengths of their conversations where the model can attend by them,
    and the model is made to; `use_stock_attention` undoes it. Models that cannot derive the dense
    mask from the positions, as before.

    Args:
        model: a causal language model of transformers; adapters may be wrapped around it.
        batch: on the model's device.
    """
    inputs = batch.model_inputs()
    on_cpu = batch.input_ids.device.type == "cpu"
    if batch.packed and not (on_cpu and batch.input_ids.shape[1] < _LEAST) and _attach(model):
        lengths = torch.tensor(batch.segment_lengths, dtype=_LENGTHS)
        inputs["attention_mask"] = lengths[None, None, None]  # 4 dimensions: passed on as it is
    return inputs


def use_stock_attention(model: nn.Module) -> None:
    """Give a model its stock attention back, under hooks if it has any."""
    stock = {ours: name for name, ours in _NAMES.items()}
    for config in _configs.get(model, []):
        name = config._attn_implementation
        config._attn_implementation = stock.get(name, name)


def _attach(model: nn.Module) -> bool:
    """Make a model attend by lengths where it is given them; false if it cannot."""
    register_packed_attention()
    if model not in _configs:
        _configs[model] = _replaceable(model)
    configs = _configs[model]
    names = [config._attn_implementation for config in configs]
    if not configs or not {*names} <= {*_NAMES, *_NAMES.values()}:
        return False
    for config, name in zip(configs, names, strict=True):
        config._attn_implementation = _NAMES.get(name, name)
    return True


def _replaceable(model: nn.Module) -> list[Any]:
    """The configurations that name a model's attention; none if that cannot be replaced.

    A family that supports flash attention hands its windows and scales to the attention function,
    and asks no more of it than to be causal within packed sequences.
    """
    from transformers import PreTrainedModel

    decoders = [m for m in model.modules() if isinstance(m, PreTrainedModel)]
    found = {id(m.config): m.config for m in model.modules() if _names_attention(m)}
    plain = all(
        decoder._supports_flash_attn
        and not decoder._is_stateful  # a recurrence, to which the mask of its tokens is passed
        and {*(getattr(decoder.config, "layer_types", None) or ())} <= _KINDS
        and getattr(decoder.config, "is_causal", True)
        and not getattr(decoder.config, "use_bidirectional_attention", None)
        for decoder in decoders
    )
    return list(found.values()) if decoders and plain else []


def _names_attention(module: nn.Module) -> bool:
    return hasattr(getattr(module, "config", None), "_attn_implementation")


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The stock attention, or that of packed rows if lengths stand in the place of the mask.

    Args:
        module: attention module of a layer.
        query: [B, H, L, d].
        key: [B, KV, L, d].
        value: [B, KV, L, d_v].
        attention_mask: [1, 1, 1, n] lengths, or any mask.
        kwargs: what else the layer says.

    Returns:
        [B, L, H, d_v] and no weights.
    """
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    stock = ALL_ATTENTION_FUNCTIONS["sdpa"]
    if attention_mask is None or attention_mask.dtype != _LENGTHS:
        found: tuple[Tensor, None] = stock(module, query, key, value, attention_mask, **kwargs)
        return found
    lengths: list[int] = attention_mask.flatten().tolist()
    window = kwargs.get("sliding_window", getattr(module, "sliding_window", None))
    if window is not None and window >= max(lengths):
        window = None
    if query.is_cuda and torch.is_autocast_enabled("cuda"):
        query, key, value = (
            each.to(torch.get_autocast_dtype("cuda")) for each in (query, key, value)
        )
    if _one_call_serves(query, value, kwargs):
        return _in_one_call(query, key, value, lengths, window, kwargs.get("scaling")), None
    by_row = [torch.split(each, 1) for each in (query, key, value)]
    rows, waiting = [], iter(lengths)
    for of_row in zip(*by_row, strict=True):
        sizes = _sizes_of_row(waiting, query.shape[2])
        parts = zip(*(torch.split(each, sizes, dim=2) for each in of_row), strict=True)
        rows.append(torch.cat([_within(stock, module, part, window, kwargs) for part in parts], 1))
    return torch.cat(rows), None


def _sizes_of_row(lengths: Any, positions: int) -> list[int]:
    """The next lengths that fill a row."""
    sizes: list[int] = []
    while sum(sizes) < positions:
        sizes.append(next(lengths))
    return sizes


def _within(
    stock: Any,
    module: nn.Module,
    segment: tuple[Tensor, ...],
    window: int | None,
    kwargs: dict[str, Any],
) -> Tensor:
    """[1, l, H, d_v]: the attention of one conversation.

    Under a window, as many queries at a time as it is long: they see at most twice as many keys.
    """
    query, key, value = segment
    length = query.shape[2]
    if window is None or window >= length:
        output: Tensor = stock(module, query, key, value, None, **kwargs)[0]
        return output
    parts, block = [], max(window, _WINDOW_BLOCK)
    for start in range(0, length, block):
        rows = slice(start, min(start + block, length))
        keys = slice(max(0, start - window + 1), rows.stop)
        i = torch.arange(rows.start, rows.stop, device=query.device)[:, None]
        j = torch.arange(keys.start, keys.stop, device=query.device)
        mask = ((j <= i) & (j > i - window))[None, None]
        part = (query[:, :, rows], key[:, :, keys], value[:, :, keys])
        parts.append(stock(module, *part, mask, **kwargs)[0])
    return torch.cat(parts, 1)


_WINDOW_BLOCK = 256  # least number of queries in one stock call under a window


def _one_call_serves(query: Tensor, value: Tensor, kwargs: dict[str, Any]) -> bool:
    """Whether `varlen_attn` takes these: 16 bits, heads of up to 256 by eights, no dropout."""
    return (
        query.is_cuda
        and query.dtype in (torch.float16, torch.bfloat16)
        and query.shape[-1] % 8 == 0
        and value.shape[-1] <= query.shape[-1] <= 256
        and not kwargs.get("dropout")
        and kwargs.get("is_causal") is not False
        and kwargs.get("position_bias") is None
        and _ampere(query.device)
    )


@functools.cache
def _ampere(device: torch.device) -> bool:
    return torch.version.hip is None and torch.cuda.get_device_capability(device) >= (8, 0)


def _in_one_call(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    lengths: Sequence[int],
    window: int | None,
    scale: float | None,
) -> Tensor:
    """[B, L, H, d_v]: the attention of all conversations of all rows, which follow each other."""
    from torch.nn.attention.varlen import varlen_attn

    batch, heads, positions, width = query.shape
    value_width = value.shape[-1]
    if value_width < width:
        value = pad(value, (0, width - value_width))
    query, key, value = (each.transpose(1, 2).flatten(0, 1) for each in (query, key, value))
    more: dict[str, Any] = (
        {"enable_gqa": heads != key.shape[1]} if _asks_for_groups(varlen_attn) else {}
    )
    bounds, longest = _bounds(tuple(lengths), query.device), max(lengths)
    output: Any = varlen_attn(
        query,
        key,
        value,
        bounds,
        bounds,
        longest,
        longest,
        scale=scale,
        window_size=(-1 if window is None else window - 1, 0),  # keys before a row, and after
        **more,
    )
    attended: Tensor = output[..., :value_width].view(batch, positions, heads, value_width)
    return attended


@functools.cache
def _asks_for_groups(function: Any) -> bool:
    """Whether grouped keys have to be asked for; torch 2.11 takes them unasked."""
    return "enable_gqa" in inspect.signature(function).parameters


@functools.lru_cache(maxsize=16)
def _bounds(lengths: tuple[int, ...], device: torch.device) -> Tensor:
    """[n + 1] where conversations begin and end, once for all layers of a pass."""
    ends = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    return to_device(ends, device)


@functools.cache
def register_packed_attention() -> None:
    """Give transformers this attention by its name; here, as its modules of models load slowly."""
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface
    from transformers.modeling_utils import AttentionInterface

    AttentionInterface.register(PACKED, _attention)
    AttentionMaskInterface.register(PACKED, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
