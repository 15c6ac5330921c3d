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

from dominie.data.batches import Batch
from dominie.losses.objective import Losses, Objective
from dominie.losses.signal import Signal
from dominie.losses.terms import Attention
from dominie.losses.tiles import sum_precision
from dominie.models.capture import AttentionTarget, StudentAttention
from dominie.models.head import causal_lm, output_head


@dataclass(frozen=True)
class Lesson:
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
def teaching(
    model: nn.Module,
    objective: Objective,
    layer_pairs: Sequence[tuple[int, int]] = (),
    *,
    options: Attention | None = None,
) -> Iterator[None]:
    """Within, `model(lesson=…)` returns `{"loss": summed loss, "terms": …, "by_source": …}`.

    Args:
        model: a transformers causal language model, or one under peft adapters.
        objective: the loss of the stage.
        layer_pairs: (student layer, teacher layer) compared by the attention term.
        options: of that term, but for its weights, which are the objective's, and its layers.
    """
    inner = causal_lm(model)
    plain_forward = inner.forward
    options = options or Attention()
    attention = None
    if layer_pairs:
        attention = StudentAttention(
            inner,
            layer_pairs,
            backend=options.backend,
            row_fraction=options.row_fraction,
            layer_fraction=options.layer_fraction,
        )

    def forward(*args: Any, lesson: Lesson | None = None, **kwargs: Any) -> Any:
        if lesson is None:
            return plain_forward(*args, **kwargs)
        losses = _losses(inner, objective, attention, lesson)
        terms = dict(losses.terms)
        if not lesson.measured:
            terms.pop("attention", None)  # its gradient was taken, its value was not
        return {"loss": losses.total, "terms": terms, "by_source": losses.by_source}

    inner.forward = forward
    try:
        yield
    finally:
        vars(inner).pop("forward", None)
        if attention is not None:
            attention.detach()


def _losses(
    model: Any, objective: Objective, attention: StudentAttention | None, lesson: Lesson
) -> Losses:
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
    hidden: Tensor = model.get_decoder()(**batch.model_inputs()).last_hidden_state
    return objective(
        hidden,
        output_head(model),
        labels=batch.labels,
        source_ids=batch.source_ids,
        signal=signal,
        metrics=lesson.measured,
        attention=attention.take() if attention is not None and maps else None,
    )
