"""Which mixture of experts a dense family's model can become, and what that is called on disk."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dominie.errors import InputError

#: The three projections of a feed-forward layer, as dense families name them.
PROJECTIONS = ("gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class Mixture:
    """The mixture of a family.

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
    block: str
    projections: tuple[str, str, str]
    experts_key: str
    own_width: bool
    shared: bool
    cannot: Mapping[str, Any]

    def shared_width(self, config: Any) -> int:
        """Intermediate size of the shared expert: thin, since it begins by adding nothing."""
        return max(8, int(config.intermediate_size) // 16) if self.shared else 0

    def configuration(self, dense: Any, *, experts: int, experts_per_token: int) -> Any:
        """The configuration of the mixture that a dense configuration becomes."""
        from transformers import AutoConfig

        blank = AutoConfig.for_model(self.model_type).to_dict()
        own = {"model_type", "architectures", "transformers_version", "_name_or_path"}
        kept = {key: value for key, value in dense.to_dict().items() if key in blank.keys() - own}
        if (head_dim := getattr(dense, "head_dim", None)) is not None:
            kept["head_dim"] = head_dim
        chosen: dict[str, Any] = {
            self.experts_key: experts,
            "num_experts_per_tok": experts_per_token,
        }
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
    shared=False,
    cannot={"attention_bias": False, "mlp_bias": False},
)
_QWEN2_MOE = Mixture(
    model_type="qwen2_moe",
    architecture="Qwen2MoeForCausalLM",
    block="mlp",
    projections=PROJECTIONS,
    experts_key="num_experts",
    own_width=True,
    shared=True,
    cannot={},
)
_QWEN3_MOE = Mixture(
    model_type="qwen3_moe",
    architecture="Qwen3MoeForCausalLM",
    block="mlp",
    projections=PROJECTIONS,
    experts_key="num_experts",
    own_width=True,
    shared=False,
    cannot={"use_sliding_window": False},
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


def experts_of(config: Any) -> int | None:
    """How many routed experts a model's layers have; None for a dense model."""
    for key in ("num_local_experts", "num_experts", "n_routed_experts"):
        if (found := getattr(config, key, None)) and found > 1:
            return int(found)
    return None
