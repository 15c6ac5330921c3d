"""Describes a model before its weights are loaded: the facts that checks, plans and cards ask."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from dominie.core.errors import InputError
from dominie.models.spec import Model, base_and_adapter

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
        heads: of an attention layer.
        key_heads: of its keys and values.
        head_size: of a query.
        hidden_size: of a hidden state.
        experts: routed experts of a layer; None for a dense model.
        experts_per_token: how many of them a token is sent to.
        dtype: `fp32`, `bf16` or `fp16`, that its frozen weights are loaded in.
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
    heads: int | None = None
    key_heads: int | None = None
    head_size: int | None = None
    hidden_size: int | None = None
    experts: int | None = None
    experts_per_token: int | None = None
    dtype: str | None = None

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
        heads=heads,
        key_heads=getattr(config, "num_key_value_heads", None) or heads,
        head_size=getattr(config, "head_dim", None) or (hidden and heads and hidden // heads),
        hidden_size=hidden,
        experts=experts_of(config),
        experts_per_token=getattr(config, "num_experts_per_tok", None),
        dtype=spec.dtype if spec and spec.dtype != "auto" else _DTYPES.get(stored),
    )


def experts_of(config: Any) -> int | None:
    """Count the routed experts of a layer; None for a dense model."""
    for key in ("num_local_experts", "num_experts", "n_routed_experts"):
        if (found := getattr(config, key, None)) and found > 1:
            return int(found)
    return None
