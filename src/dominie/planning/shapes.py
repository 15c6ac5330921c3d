"""Parameters of a model from its configuration: all, those of a token's path, those of its head."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from torch import nn

from dominie.models.flops import experts_of_a_token, products_of
from dominie.planning.trace import Pass, bare_model


@dataclass(frozen=True)
class Shape:
    """Counts of a model.

    Attributes:
        parameters: all weights.
        active: weights that a token passes through: of a mixture's experts those it is sent to.
        multiplied: active weights that are factors of a product: no embedding table, no norm.
        experts: weights of a mixture's experts, which are joined as they are loaded.
        quantisable: weights of linear layers but the head, and of experts: what 8 or 4 bits hold.
        in_layers: weights of all layers, without embeddings, last norm and head.
        largest_layer: weights of the layer that has most.
        vocabulary: rows of the head.
        width: of a hidden state.
        layers: of the model.
        heads: of an attention layer.
        key_heads: of its keys.
        head_width: of a query.
        tied: whether the head is the embedding table.
    """

    parameters: int
    active: int
    multiplied: int
    experts: int
    quantisable: int
    in_layers: int
    largest_layer: int
    vocabulary: int
    width: int
    layers: int
    heads: int
    key_heads: int
    head_width: int
    tied: bool


def shape_of(config: Any) -> Shape:
    """The counts of a model of this configuration."""
    return _shape(_Key(config))


class _Key:
    """A configuration, equal to one that is written the same."""

    def __init__(self, config: Any) -> None:
        self.config, self.text = config, config.to_json_string(use_diff=False)

    def __hash__(self) -> int:
        return hash(self.text)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Key) and self.text == other.text


@lru_cache(maxsize=64)
def _shape(key: _Key) -> Shape:
    config = key.config
    model = bare_model(config, Pass(rows=1, length=2, dtype="bf16"))
    parameters = sum(p.numel() for p in model.parameters())
    experts = sum(p.numel() for name, p in model.named_parameters() if ".experts." in name)
    chosen = experts_of_a_token(config)
    active = parameters - round(experts * (1 - chosen))
    head = model.get_output_embeddings().weight
    table = model.get_input_embeddings().weight
    tied = head is table
    linear = [m.weight for m in model.modules() if isinstance(m, nn.Linear)]
    layers = model.get_decoder().layers
    sizes = [sum(p.numel() for p in layer.parameters()) for layer in layers]
    heads = config.num_attention_heads
    return Shape(
        parameters=parameters,
        active=active,
        multiplied=round(products_of(model).weights),
        experts=experts,
        quantisable=sum(w.numel() for w in linear if w is not head) + experts,
        in_layers=sum(sizes),
        largest_layer=max(sizes),
        vocabulary=head.shape[0],
        width=head.shape[1],
        layers=len(layers),
        heads=heads,
        key_heads=getattr(config, "num_key_value_heads", None) or heads,
        head_width=getattr(config, "head_dim", None) or config.hidden_size // heads,
        tied=tied,
    )
