"""FLOPs of a model's passes, counted from its weights and from the keys its tokens attend to."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import nn

from dominie.models.head import causal_lm, text_config
from dominie.models.info import ModelInfo, info_of


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

        A weight is met forward, by the gradient of its input, and by its own where it has one
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
