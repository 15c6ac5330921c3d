"""What the losses of a mixture's routers hold: they look at every expert's logit of every token."""

from __future__ import annotations

from typing import Any, NamedTuple

from dominie.models.mixtures import experts_of


class RouterLoss(NamedTuple):
    """Bytes: kept for the backward pass, and held for a while beside that."""

    kept: float = 0.0
    working: float = 0.0


def router_loss_memory(config: Any, tokens: int) -> RouterLoss:
    """Of `dominie.losses.router.router_loss` over the layers of a student, in fp32.

    Args:
        config: of the student.
        tokens: of a micro-batch, padding and all.
    """
    experts = experts_of(config)
    if experts is None:
        return RouterLoss()
    chosen = getattr(config, "num_experts_per_tok", 0) or 0
    logits = tokens * experts * 4.0  # without padding; of these the log-sum-exp
    softmax = 0.0 if chosen == experts else logits  # nothing to balance where all are chosen
    one_hot = 0.0 if chosen == experts else tokens * chosen * experts * (8.0 + 4.0)
    return RouterLoss(config.num_hidden_layers * (logits + softmax), one_hot)
