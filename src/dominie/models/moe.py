"""Mixtures of experts: families, routers while they run, and experts under autocast."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from dominie.core.errors import InputError
from dominie.losses.router_losses import Routing
from dominie.models.head import decoder, text_config
from dominie.models.info import KEPT, ModelInfo, experts_of, info_of

#: The three projections of a feed-forward layer, as dense families name them.
PROJECTIONS = ("gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True, kw_only=True)
class Mixture:
    """The mixture of a family; defaults are those of Qwen's.

    Attributes:
        model_type: what transformers calls it.
        architecture: its class with a language-modelling head.
        block: name of a layer's experts and gate on disk.
        projections: names of an expert's projections on disk, in the order of `PROJECTIONS`.
        experts_key: what its configuration calls the number of experts.
        own_width: whether its configuration calls an expert's width `moe_intermediate_size`.
        shared: whether every layer has an expert beside the routed ones that sees every token.
        cannot: settings of the dense family that it has no counterpart of, with the one value it
            stands for.
    """

    model_type: str
    architecture: str
    block: str = "mlp"
    projections: tuple[str, str, str] = PROJECTIONS
    experts_key: str = "num_experts"
    own_width: bool = True
    shared: bool = False
    cannot: Mapping[str, Any] = field(default_factory=dict)

    def shared_width(self, config: Any) -> int:
        """Intermediate size of the shared expert: thin, since it begins by adding nothing."""
        return max(8, int(config.intermediate_size) // 16) if self.shared else 0

    def configuration(self, dense: Any, *, experts: int, experts_per_token: int) -> Any:
        """The configuration of the mixture that a dense configuration becomes."""
        from transformers import AutoConfig

        blank = AutoConfig.for_model(self.model_type).to_dict()
        own = {"model_type", "architectures", "transformers_version", "_name_or_path"}
        kept = {key: value for key, value in dense.to_dict().items() if key in blank.keys() - own}
        for key in ("head_dim", *KEPT):
            if (value := getattr(dense, key, None)) is not None:
                kept[key] = value
        chosen: dict[str, Any] = {self.experts_key: experts}
        chosen["num_experts_per_tok"] = experts_per_token
        if self.own_width:
            chosen |= {
                "moe_intermediate_size": dense.intermediate_size,
                "norm_topk_prob": True,
                "decoder_sparse_step": 1,
                "mlp_only_layers": [],
            }
        if self.shared:
            chosen["shared_expert_intermediate_size"] = self.shared_width(dense)
        config = AutoConfig.for_model(self.model_type, **{**kept, **chosen})
        config.architectures = [self.architecture]
        config.dtype = dense.dtype
        return config


_MIXTRAL = Mixture(
    model_type="mixtral",
    architecture="MixtralForCausalLM",
    block="block_sparse_moe",
    projections=("w1", "w3", "w2"),
    experts_key="num_local_experts",
    own_width=False,
    cannot={"attention_bias": False, "mlp_bias": False},
)
_QWEN2_MOE = Mixture(model_type="qwen2_moe", architecture="Qwen2MoeForCausalLM", shared=True)
_QWEN3_MOE = Mixture(
    model_type="qwen3_moe", architecture="Qwen3MoeForCausalLM", cannot={"use_sliding_window": False}
)

#: By the `model_type` of the dense family.
MIXTURES = {"mistral": _MIXTRAL, "llama": _MIXTRAL, "qwen2": _QWEN2_MOE, "qwen3": _QWEN3_MOE}


def mixture_of(dense: Any, *, where: str) -> Mixture:
    """The mixture a dense model can become without computing anything else than it did.

    Args:
        dense: its configuration.
        where: what the message names.

    Raises:
        InputError: there is none for the family, or for one of the model's settings.
    """
    mixture = MIXTURES.get(dense.model_type)
    if mixture is None:
        raise InputError(
            "this architecture cannot be made a mixture of experts",
            where=where,
            expected=f"a dense model of one of {', '.join(MIXTURES)}",
            found=f"{dense.model_type}",
            do="start from the dense model, or train the mixture as it is"
            if experts_of(dense)
            else None,
        )
    for key, value in mixture.cannot.items():
        found = getattr(dense, key, value)
        if found != value:
            raise InputError(
                f"{mixture.architecture} has nothing that does what this model's {key} does",
                where=where,
                expected=f"{key}: {value}",
                found=f"{key}: {found}",
            )
    return mixture


def upcycled_info(dense: ModelInfo, *, experts: int, experts_per_token: int) -> ModelInfo:
    """Describe the mixture that a dense model becomes.

    Raises:
        InputError: there is none for its family or settings, or these are not known.
    """
    config = dense.need("config", use="making a mixture of experts")
    mixture = mixture_of(config, where=dense.name)
    return info_of(
        mixture.configuration(config, experts=experts, experts_per_token=experts_per_token)
    )


class Routers:
    """The routers of a model, layer by layer.

    Only what runs within `recorded` is kept: under activation checkpointing a layer runs again in
    the backward pass, which is not to count twice.

    Args:
        model: a causal language model of transformers; adapters may be wrapped around it.
    """

    def __init__(self, model: nn.Module) -> None:
        self._routing: list[Routing] | None = None
        self._per_token = info_of(text_config(model)).experts_per_token or 1
        # What transformers itself would record, were the model asked for its router's logits.
        recorded = getattr(decoder(model), "_can_record_outputs", None) or {}
        gate = recorded.get("router_logits")
        kind = getattr(gate, "target_class", None)
        self._place = getattr(gate, "index", 0)
        found = [m for m in decoder(model).modules() if kind is not None and isinstance(m, kind)]
        self._hooks = [module.register_forward_hook(self._record) for module in found]

    def __bool__(self) -> bool:
        """Whether the model has any."""
        return bool(self._hooks)

    @contextlib.contextmanager
    def recorded(self) -> Iterator[list[Routing]]:
        """Record what the routers decide meanwhile, in the order in which they run."""
        self._routing = []
        try:
            yield self._routing
        finally:
            self._routing = None

    def detach(self) -> None:
        """Leave the model alone."""
        for hook in self._hooks:
            hook.remove()

    def _record(self, _: nn.Module, __: Any, output: Any) -> None:
        if self._routing is None:
            return
        parts = output if isinstance(output, tuple) else (output,)
        logits: Tensor = parts[self._place]
        logits = logits.reshape(-1, logits.shape[-1])
        chosen = next((part for part in parts if not part.is_floating_point()), None)
        if chosen is None:
            chosen = torch.topk(logits, self._per_token, dim=-1).indices
        self._routing.append(Routing(logits, chosen.reshape(len(logits), -1)))


_STOCK, _NAME = "grouped_mm", "dominie_grouped_mm"


class _Rounded:
    """A module as it is, but for its fp32 weights."""

    def __init__(self, module: nn.Module, dtype: torch.dtype) -> None:
        self._module = module
        self._rounded = {
            name: weight.to(dtype)
            for name, weight in module.named_parameters(recurse=False)
            if weight.dtype == torch.float32
        }

    def __getattr__(self, name: str) -> Any:
        rounded = self._rounded
        return rounded[name] if name in rounded else getattr(self._module, name)


@functools.cache
def _register() -> None:
    """Register the experts that follow autocast with transformers, which is slow to import."""
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, ExpertsInterface

    def experts(module: nn.Module, hidden: Tensor, *arguments: Tensor) -> Tensor:
        device = hidden.device.type
        rounded: Any = module
        if torch.is_autocast_enabled(device):
            rounded = _Rounded(module, torch.get_autocast_dtype(device))
        output: Tensor = ALL_EXPERTS_FUNCTIONS[_STOCK](rounded, hidden, *arguments)
        return output

    ExpertsInterface.register(_NAME, experts)


def follow_autocast(model: Any) -> None:
    """Have a mixture's experts follow autocast; a model without any is left as it is."""
    if getattr(model.config, "_experts_implementation", None) == _STOCK and any(
        ".experts" in name for name, _ in model.named_modules()
    ):
        _register()
        model.set_experts_implementation(_NAME)
