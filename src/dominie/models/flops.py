"""Products of a model's passes, counted from its weights and from what its tokens see."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from dominie.models.head import causal_lm, text_config
from dominie.models.info import experts_of


@dataclass(frozen=True)
class Load:
    """What a model reads.

    Attributes:
        tokens: no padding.
        supervised: those that reach the head.
        keys: how many keys the tokens see in all, by the window of the layer (None sees all).
    """

    tokens: float
    supervised: float
    keys: Mapping[int | None, float]


@dataclass(frozen=True)
class Products:
    """Factors of the products of a model.

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

    def forward(self, load: Load) -> float:
        """Floating-point operations of a forward pass, a product and its sum counted as two."""
        body = (self.frozen + self.trained) * load.tokens
        return 2 * (body + self.head * load.supervised) + self._attention(load)

    def training(self, load: Load) -> float:
        """Of a forward and a backward pass; what checkpointing computes again does not count.

        A weight is met forward, by the gradient of its input, and by its own where it has one
        (Chowdhery et al., PaLM, 2022, appendix B: 6 a weight; attention here is causal).
        """
        body = (4 * self.frozen + 6 * self.trained) * load.tokens
        head = (6 if self.head_trained else 4) * self.head * load.supervised
        return body + head + 3 * self._attention(load)

    def _attention(self, load: Load) -> float:
        """Scores and sums of values: four operations for each key that a token sees."""
        return sum(4 * width * load.keys[window] for window, width in self.attended.items())


def products_of(model: nn.Module, *, adapters: bool = True) -> Products:
    """The factors of a causal language model.

    Linear layers are told by their widths, which quantising and sharding leave as they are.

    Args:
        model: of transformers, with or without peft adapters.
        adapters: whether these count.
    """
    inner, config = causal_lm(model), text_config(model)
    head = inner.get_output_embeddings()
    apart = set(head.modules())
    chosen = experts_of_a_token(config)
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
    return Products(
        frozen=counts[False],
        trained=counts[True],
        head=float(head.weight.shape[0] * config.hidden_size),
        head_trained=head.weight.requires_grad,
        attended=_attended(config),
    )


def _attended(config: Any) -> dict[int | None, float]:
    heads = config.num_attention_heads
    width = heads * (getattr(config, "head_dim", None) or config.hidden_size // heads)
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None) or [""] * config.num_hidden_layers
    found: dict[int | None, float] = {}
    for kind in kinds:
        seen = None if kind == "full_attention" else window
        found[seen] = found.get(seen, 0.0) + width
    return found


def experts_of_a_token(config: Any) -> float:
    """Share of a mixture's experts that a token is sent to; 1 where there is no mixture."""
    experts = experts_of(config)
    if experts is None:
        return 1.0
    return float(min(1.0, getattr(config, "num_experts_per_tok", experts) / experts))
