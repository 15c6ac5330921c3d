"""Describes a model: what is known before its weights are loaded, and FLOPs of its passes."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from torch import nn

from dominie.core.errors import InputError
from dominie.models.gguf_header import is_gguf, read_header
from dominie.models.head import causal_lm, text_config
from dominie.models.model_folder import base_and_adapter
from dominie.models.spec import Model

#: Where a model is: a folder here, the hub, what a stage makes, or behind a server.
Origin = Literal["local", "hub", "stage", "server"]

_DTYPES = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}


@dataclass(frozen=True, kw_only=True, eq=False)
class ModelInfo:
    """What is known of a model. A fact that is None is not known, or the model has none.

    Attributes:
        name: by which messages name it.
        origin: where it is.
        spec: what its weights are loaded from; None if they cannot be.
        tokenizer_spec: what its tokenizer is loaded from.
        base: folder, hub id or stage of its weights, and
        adapter: folder, hub id or stage of the adapter over them; None for a whole model.
        config: of its language part, by transformers; None if only a description is known.
        family: `model_type` of that configuration.
        vocabulary: rows of its embedding table.
        context: longest conversation that it can place, in tokens.
        layers: of the decoder.
        kept_layers: of a pruned model, the layer of the whole one that each of its layers was.
        original_layers: of a pruned model, how many layers the whole one has.
        heads: of an attention layer.
        key_heads: of its keys and values.
        head_size: of a query.
        hidden_size: of a hidden state.
        experts: routed experts of a layer; None for a dense model.
        experts_per_token: how many of them a token is sent to.
        dtype: `fp32`, `bf16` or `fp16`, that its frozen weights are loaded in.
        rounded: what the weights of a GGUF file are rounded to, as ggml calls it.
    """

    name: str
    origin: Origin
    spec: Model | None = None
    tokenizer_spec: Model | None = None
    base: str | None = None
    adapter: str | None = None
    config: Any = None
    family: str | None = None
    vocabulary: int | None = None
    context: int | None = None
    layers: int | None = None
    kept_layers: tuple[int, ...] | None = None
    original_layers: int | None = None
    heads: int | None = None
    key_heads: int | None = None
    head_size: int | None = None
    hidden_size: int | None = None
    experts: int | None = None
    experts_per_token: int | None = None
    dtype: str | None = None
    rounded: str | None = None

    def need(self, fact: str, *, use: str) -> Any:
        """A fact by its name.

        Args:
            fact: an attribute of this class.
            use: what cannot be done without it, for the message.

        Raises:
            InputError: it is not known.
        """
        value = getattr(self, fact)
        if value is None:
            raise InputError(
                f"{use} needs to know more of this model than is known",
                where=self.name,
                expected=fact.replace("_", " "),
                found=f"a model {_PLACES[self.origin]} without it",
                do="name a folder or a model of the hub with a config.json",
            )
        return value

    def tokenizer(self) -> Any:
        """Load its tokenizer.

        Raises:
            InputError: there is none, or none that can say which characters a token covers.
        """
        from dominie.models.loading import load_tokenizer

        return load_tokenizer(self.need("tokenizer_spec", use="tokenising"))

    def identity(self) -> dict[str, Any]:
        """Name the model for a fingerprint: by hub id, a folder's files, or what is known of it."""
        from dominie.models.weights import model_identity

        if self.spec is not None:
            return model_identity(self.spec)
        facts = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        if self.origin == "server":
            del facts["name"]  # is the recipe's; `base` is that at the server
        return {name: fact for name, fact in facts.items() if isinstance(fact, str | int)}


_PLACES: dict[Origin, str] = {
    "local": "in a folder",
    "hub": "of the hub",
    "stage": "that a stage makes",
    "server": "behind a server",
}


def describe(spec: Model, *, name: str | None = None) -> ModelInfo:
    """Read what is known of a model in a folder or on the hub.

    Args:
        spec: which model.
        name: by which messages name it; its path if none is given.

    Raises:
        InputError: it has no configuration, or transformers does not know the family.
    """
    from dominie.models.loading import load_config

    return info_of(load_config(spec), spec=spec, name=name)


def info_of(config: Any, *, spec: Model | None = None, name: str | None = None) -> ModelInfo:
    """Read the facts off a configuration of transformers.

    Args:
        config: of a model, or of its language part.
        spec: what the model is loaded from.
        name: by which messages name it.
    """
    config = config.get_text_config()
    heads = getattr(config, "num_attention_heads", None)
    hidden = getattr(config, "hidden_size", None)
    stored = str(getattr(config, "dtype", None)).removeprefix("torch.")
    base, adapter = (None, None) if spec is None else base_and_adapter(spec)
    kept, original = _kept_of(config)
    return ModelInfo(
        name=name or (spec.path if spec else getattr(config, "_name_or_path", "") or "a model"),
        origin="local" if base is None or Path(base).exists() else "hub",
        spec=spec,
        tokenizer_spec=spec,
        base=base,
        adapter=adapter,
        config=config,
        family=config.model_type,
        vocabulary=getattr(config, "vocab_size", None),
        context=getattr(config, "max_position_embeddings", None),
        layers=getattr(config, "num_hidden_layers", None),
        kept_layers=kept,
        original_layers=original,
        heads=heads,
        key_heads=getattr(config, "num_key_value_heads", None) or heads,
        head_size=getattr(config, "head_dim", None) or (hidden and heads and hidden // heads),
        hidden_size=hidden,
        experts=experts_of(config),
        experts_per_token=getattr(config, "num_experts_per_tok", None),
        dtype=spec.dtype if spec and spec.dtype != "auto" else _DTYPES.get(stored),
        rounded=read_header(base).rounded if base and is_gguf(base) else None,
    )


#: What the configuration of a pruned model says of its layers: which of how many they were.
KEPT = ("kept_layers", "original_num_hidden_layers")


def _kept_of(config: Any) -> tuple[tuple[int, ...] | None, int | None]:
    """Read which layers of how many a pruned model has kept; None if it was not pruned."""
    kept, original = (getattr(config, key, None) for key in KEPT)
    if not (isinstance(kept, list) and isinstance(original, int)):
        return None, None
    known = len(kept) == getattr(config, "num_hidden_layers", None)
    ascending = all(isinstance(n, int) for n in kept) and sorted(set(kept)) == kept
    if not (known and ascending and kept and kept[0] >= 0 and kept[-1] < original):
        return None, None  # somebody else's keys
    return tuple(kept), original


def experts_of(config: Any) -> int | None:
    """Count the routed experts of a layer; None for a dense model."""
    for key in ("num_local_experts", "num_experts", "n_routed_experts"):
        if (found := getattr(config, key, None)) and found > 1:
            return int(found)
    return None


@dataclass(frozen=True)
class Workload:
    """Tokens that a model processes.

    Attributes:
        tokens: no padding.
        supervised: those that reach the head.
        keys: how many keys the tokens attend to in all, by the window of the layer (None: no
            window).
    """

    tokens: float
    supervised: float
    keys: Mapping[int | None, float]

    @classmethod
    def of_a_token(cls, windows: Iterable[int | None], length: float) -> Workload:
        """A supervised token, on average over a conversation of `length`."""
        return cls(1.0, 1.0, {window: _mean_keys(length, window) for window in windows})


def _mean_keys(length: float, window: int | None) -> float:
    """Mean over positions 1 … length of min(position, window)."""
    if window is None or window >= length:
        return (length + 1) / 2
    return window - window * (window - 1) / (2 * length)


@dataclass(frozen=True)
class ModelFlops:
    """What the FLOPs of a model follow from.

    Attributes:
        frozen: weights of the matrices that a token passes through, of a mixture's experts those it
            is sent to, without a gradient; the head apart, and no embedding table.
        trained: the same with a gradient.
        head: weights of the head.
        head_trained: whether it has a gradient.
        attended: width of all query heads together, summed over the layers of a window.
    """

    frozen: float
    trained: float
    head: float
    head_trained: bool
    attended: Mapping[int | None, float]

    @property
    def weights(self) -> float:
        """All that a supervised token meets."""
        return self.frozen + self.trained + self.head

    def forward(self, work: Workload) -> float:
        """Floating-point operations of a forward pass, a product and its sum counted as two."""
        body = (self.frozen + self.trained) * work.tokens
        return 2 * (body + self.head * work.supervised) + self._attention(work)

    def training(self, work: Workload) -> float:
        """Of a forward and a backward pass; what checkpointing computes again does not count.

        A weight is met forward, by the gradient of its input, and by its own if it has one
        (Chowdhery et al., PaLM, 2022, appendix B: 6 a weight; attention here is causal).
        """
        body = (4 * self.frozen + 6 * self.trained) * work.tokens
        head = (6 if self.head_trained else 4) * self.head * work.supervised
        return body + head + 3 * self._attention(work)

    def _attention(self, work: Workload) -> float:
        """Scores and sums of values: four operations for each key that a token sees."""
        return sum(4 * width * work.keys[window] for window, width in self.attended.items())


def model_flops(model: nn.Module, *, adapters: bool = True) -> ModelFlops:
    """Count the weights that a causal language model multiplies by.

    Linear layers are counted by their widths, which quantising and sharding leave as they are.

    Args:
        model: of transformers, with or without peft adapters.
        adapters: whether these count.
    """
    inner, info = causal_lm(model), info_of(text_config(model))
    head = inner.get_output_embeddings()
    apart = set(head.modules())
    chosen = active_experts(info)
    counts = {False: 0.0, True: 0.0}
    for name, module in inner.named_modules():
        lora = ".lora_" in name
        if module in apart or isinstance(module, nn.Embedding) or (lora and not adapters):
            continue
        share = chosen if ".experts" in name else 1.0
        if isinstance(module, nn.Linear):
            size = module.in_features * module.out_features
            counts[module.weight.requires_grad] += share * size
            continue
        for weight in module.parameters(recurse=False):
            if weight.ndim > 1:
                counts[weight.requires_grad] += share * weight.numel()
    return ModelFlops(
        frozen=counts[False],
        trained=counts[True],
        head=float(head.weight.shape[0] * info.need("hidden_size", use="counting FLOPs")),
        head_trained=head.weight.requires_grad,
        attended=_attended(info),
    )


def _attended(info: ModelInfo) -> dict[int | None, float]:
    heads, size = (info.need(fact, use="counting FLOPs") for fact in ("heads", "head_size"))
    window = getattr(info.config, "sliding_window", None)
    kinds = getattr(info.config, "layer_types", None) or [""] * info.config.num_hidden_layers
    found: dict[int | None, float] = {}
    for kind in kinds:
        seen = None if kind == "full_attention" else window
        found[seen] = found.get(seen, 0.0) + heads * size
    return found


def active_experts(info: ModelInfo) -> float:
    """Fraction of a mixture's experts that a token is sent to; 1 for a dense model."""
    if info.experts is None:
        return 1.0
    return min(1.0, (info.experts_per_token or info.experts) / info.experts)
