"""The losses run inside the student's own forward pass.

DDP, FSDP2 and ZeRO-3 gather parameters and reduce gradients around a module's forward. A head
taken from outside is a shard or empty, and a loss computed outside bypasses the reduction. So the
wrapped model's forward is made to return the loss; called without a batch it is the plain model.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from dominie.core.errors import InputError
from dominie.data.batch import Batch
from dominie.losses.objective import Losses, Objective
from dominie.losses.router_losses import router_loss, routing_sums
from dominie.losses.targets import Signal
from dominie.losses.terms import Attention
from dominie.losses.tiles import sum_precision
from dominie.models.attention_capture import AttentionTarget, StudentAttention
from dominie.models.head import causal_lm, output_head
from dominie.models.moe import Routers


@dataclass(frozen=True)
class DistillationInputs:
    """A batch and what the teachers say about it.

    Attributes:
        batch: the conversations.
        signal: the teachers' word, None where no source has a teacher.
        measured: whether what does not move the student is wanted: the attention term's value
            beside its gradient, the teacher's entropy, the agreement.
    """

    batch: Batch
    signal: Signal | None = None
    measured: bool = True


@contextlib.contextmanager
def loss_in_forward(
    model: nn.Module,
    objective: Objective,
    layer_pairs: Sequence[tuple[int, int]] = (),
    *,
    options: Attention | None = None,
) -> Iterator[None]:
    """Within, `model(lesson=…)` returns `{"loss": summed loss, "terms": …, "by_source": …}`.

    A mixture of experts adds `"routing"`, the `routing_sums` of its layers.

    Args:
        model: a transformers causal language model, or one under peft adapters.
        objective: the loss of the stage.
        layer_pairs: (student layer, teacher layer) compared by the attention term.
        options: of that term, but for its weights, which are the objective's, and its layers.

    Raises:
        InputError: the loss has a router term and the student no router.
    """
    inner = causal_lm(model)
    plain_forward = inner.forward
    options = options or Attention()
    routers = Routers(inner)
    if objective.weighs_router and not routers:
        raise InputError(
            "the loss has a router term and the student no router",
            where="loss.router",
            expected="a student that is a mixture of experts",
            found=type(inner).__name__,
            do="remove the term, or make a mixture of the student with an upcycle stage",
        )
    attention = None
    if layer_pairs:
        attention = StudentAttention(
            inner,
            layer_pairs,
            backend=options.backend,
            row_fraction=options.row_fraction,
            layer_fraction=options.layer_fraction,
        )

    def forward(*args: Any, lesson: DistillationInputs | None = None, **kwargs: Any) -> Any:
        if lesson is None:
            return plain_forward(*args, **kwargs)
        losses, routing = _losses(inner, objective, attention, routers, lesson)
        terms = dict(losses.terms)
        if attention is not None:  # zero where no row of the batch has a map to match
            terms.setdefault("attention", losses.total.new_zeros(()))
        if not lesson.measured:
            terms.pop("attention", None)  # its gradient was taken, its value was not
        outputs = {"loss": losses.total, "terms": terms, "by_source": losses.by_source}
        return outputs if routing is None else {**outputs, "routing": routing}

    inner.forward = forward
    try:
        yield
    finally:
        vars(inner).pop("forward", None)
        routers.detach()
        if attention is not None:
            attention.detach()


def _losses(
    model: Any,
    objective: Objective,
    attention: StudentAttention | None,
    routers: Routers,
    lesson: DistillationInputs,
) -> tuple[Losses, Tensor | None]:
    """The losses of a batch, and what its routers did (`routing_sums`)."""
    batch, signal = lesson.batch, lesson.signal
    maps = [part for part in signal.parts if part.attention] if signal and attention else []
    if attention is not None and maps:
        weights = objective.attention_weights(
            batch.labels, batch.source_ids, sum_precision(model.dtype)
        )
        attention.expect(
            [AttentionTarget(part.rows, weights[part.rows], dict(part.attention)) for part in maps],
            segment_ids=batch.segment_ids if batch.packed else None,
            value=lesson.measured,
        )
    with routers.recorded() as layers:
        hidden: Tensor = model.get_decoder()(**batch.model_inputs()).last_hidden_state
    router = None
    if objective.weighs_router:
        router = router_loss(
            layers, objective.conversations(batch.labels, batch.source_ids, batch.segment_ids)
        )
    losses = objective(
        hidden,
        output_head(model),
        labels=batch.labels,
        source_ids=batch.source_ids,
        signal=signal,
        metrics=lesson.measured,
        attention=attention.take() if attention is not None and maps else None,
        router=router,
    )
    real = (batch.source_ids >= 0).flatten()
    return losses, routing_sums(layers, real) if layers else None
