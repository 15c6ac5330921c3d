"""Load balancing and the z-loss of a mixture's router, per conversation.

Both are means over the tokens of one conversation, which then count as often as the conversation
has supervised tokens; where tokens have weights, as the sum of the weights of its supervised ones.
The sum over conversations is therefore additive over micro-batches and
ranks: load balancing is not linear in the tokens, and taken over whatever happens to share a batch
it would change with the batch. Padding belongs to no conversation.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from dominie.losses.forward_pass import BySource, ForwardPass
from dominie.losses.objective import Column, Computed, Need, Term, check_weight
from dominie.losses.tiles import sum_precision


@dataclass(frozen=True)
class Routing:
    """What the router of one layer did with T tokens.

    Attributes:
        logits: [T, N] of every expert.
        chosen: [T, k] the experts that each token went to.
    """

    logits: Tensor
    chosen: Tensor

    @property
    def takes_all(self) -> bool:
        """Whether every token goes to every expert, so that there is nothing to balance."""
        return self.chosen.shape[-1] == self.logits.shape[-1]


@dataclass(frozen=True)
class Conversations:
    """Whose tokens they are.

    Attributes:
        index: [T] number of each token's conversation, −1 on padding.
        balance: [S] weight of load balancing in each conversation.
        z: [S] weight of its z-loss.
    """

    index: Tensor
    balance: Tensor
    z: Tensor


def router_loss(layers: Sequence[Routing], conversations: Conversations) -> Tensor:
    """Scalar Σ_s mean_layers( balance[s] · N·Σ_e f_e·P_e + z[s] · mean_t logsumexp(logits_t)² ).

    f_e is the share of the conversation's choices that went to expert e, and P_e its mean
    probability over all N. Balanced, N·Σ f·P is 1 for any number of choices a token (Switch
    Transformers, Fedus et al. 2021, eq. 4; transformers' Mixtral has k times this). The choices
    carry no gradient. Where each token goes to all experts it is 1 whatever the router does, and
    is left out. The z-loss is ST-MoE's (Zoph et al. 2022, eq. 5).

    Args:
        layers: of one forward pass.
        conversations: of its tokens.

    Raises:
        ValueError: no layers, or tokens that are not as many as the layers saw.
    """
    if not layers:
        raise ValueError("no layer has a router")
    count = len(conversations.balance)
    index, real = conversations.index, conversations.index >= 0
    bucket = torch.where(real, index, count)
    # Counted without `bincount`, for which a GPU is waited for.
    sizes = torch.zeros(count + 1, dtype=torch.float64, device=index.device)
    sizes = sizes.index_add_(0, bucket, torch.ones_like(bucket, dtype=torch.float64))
    sizes = sizes.clamp(min=1)
    total: Tensor | float = 0.0
    for layer in layers:
        tokens, experts = layer.logits.shape
        if tokens != len(index):
            raise ValueError(f"the router saw {tokens} tokens of {len(index)}")
        logits = layer.logits.to(sum_precision(layer.logits.dtype))
        # Padding may hold anything; no gradient is to come from it, not even 0 · inf.
        logits = torch.where(real[:, None], logits, 0.0)

        def mean(values: Tensor) -> Tensor:
            """[S, …] of [T, …] over the tokens of each conversation."""
            sums = values.new_zeros((count + 1, *values.shape[1:])).index_add(0, bucket, values)
            return (sums / sizes.to(values).view(-1, *[1] * (values.dim() - 1)))[:count]

        z = mean(logits.logsumexp(-1).square())
        total = total + (conversations.z.to(z) * z).sum()
        if not layer.takes_all:
            chosen = nn.functional.one_hot(layer.chosen, experts).to(logits.dtype).mean(1)
            balance = experts * (mean(chosen) * mean(logits.softmax(-1))).sum(-1)
            total = total + (conversations.balance.to(balance) * balance).sum()
    assert isinstance(total, Tensor)
    return total / len(layers)


@torch.no_grad()
def routing_sums(layers: Sequence[Routing], real: Tensor) -> Tensor:
    """[layers, N + 1] sums over the real tokens: routing weight by expert, and entropy in nats.

    A token's routing weight is 1, shared among the experts it goes to as the softmax over them
    has it; the entropy is that of all N probabilities.

    Args:
        layers: of one forward pass.
        real: [R] indices of the tokens that are none of the padding, or [T] whether a token is.
    """
    sums = []
    for layer in layers:
        logits = layer.logits[real].float()
        chosen = layer.chosen[real]
        shares = logits.gather(-1, chosen).softmax(-1)
        load = logits.new_zeros(logits.shape[-1])
        load.index_add_(0, chosen.flatten(), shares.flatten())
        log = logits.log_softmax(-1)
        sums.append(torch.cat([load, -(log.exp() * log).sum().view(1)]))
    return torch.stack(sums)


class RouterLoss:
    """The router term of all sources."""

    columns: ClassVar[Sequence[Column]] = ()

    def __init__(self, terms: Mapping[str, Sequence[Router | None]]) -> None:
        self._balance = BySource(each.weight if each else 0.0 for each in terms["router"])
        self._z = BySource(each.z_weight if each else 0.0 for each in terms["router"])

    def __call__(self, forward: ForwardPass) -> Computed:
        """The `router_loss` of the layers of a forward pass."""
        loss = router_loss(forward.routing, self._conversations(forward))
        return Computed(loss, {"router": loss.detach()})

    def _conversations(self, forward: ForwardPass) -> Conversations:
        """Whose tokens the B·L of a batch are, row by row, and what each conversation weighs."""
        labels, device = forward.labels, forward.labels.device
        numbers = torch.full_like(labels, -1)
        for number, span in enumerate(forward.conversations):
            numbers[span.row, span.start : span.start + span.tokens] = number
        index, scored, real = numbers.flatten(), forward.positions, forward.real
        weights = torch.ones_like(labels) if forward.weights is None else forward.weights
        nothing = torch.zeros(len(forward.conversations), dtype=torch.float64, device=device)
        tokens = nothing.index_add(0, index[scored], weights.flatten()[scored].double())
        source = nothing.long().scatter_(0, index[real], forward.source_ids.flatten()[real])
        balance, z = (
            by_source.on(device, torch.float64)[source] * tokens
            for by_source in (self._balance, self._z)
        )
        return Conversations(index, balance, z)


@dataclass(frozen=True, kw_only=True)
class Router(Term):
    """What keeps the router of a mixture of experts in order; see `dominie.losses.router_losses`.

    Attributes:
        weight: factor of load balancing, 0.01 in Switch Transformers.
        z_weight: factor of the z-loss, 0.001 in ST-MoE.
    """

    needs: ClassVar[frozenset[Need]] = frozenset({"router"})
    computation = RouterLoss
    suffices: ClassVar[bool] = False
    weight: float = 0.01
    z_weight: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_weight(self.z_weight)

    @property
    def weighs(self) -> bool:
        """Whether either part adds anything to the loss."""
        return self.weight > 0.0 or self.z_weight > 0.0
