"""The same jobs done plainly, as the authors' code does them, within the same trainer.

All logits of student and teacher are made, [B, L, V]; maps are [L, L], from eager attention; in DAE
both teachers run on every row and one is listened to; of a cache [N, V] is filled in again.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.functional import kl_div

from dominie.losses.objective import Objective
from dominie.losses.terms import LossTerms, Prediction

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from torch import Tensor

    from dominie.data.batch import Batch
    from dominie.teachers import Teacher
    from dominie.training.loss_forward import DistillationInputs


@dataclass(frozen=True)
class Said:
    """Log-probabilities [N, V] of a batch's supervised positions, and maps [B, H, L, L]."""

    log_probabilities: Tensor
    maps: Sequence[Tensor] = ()


class PlainTeacher:
    """Every teacher on every row; each row is given its source's."""

    def __init__(self, models: Sequence[Any], *, maps: bool) -> None:
        self.models, self.maps = list(models), maps

    @torch.no_grad()
    def signal(self, batch: Batch) -> Said:
        """What the teachers say, whole."""
        options = {"output_attentions": True} if self.maps else {}
        outputs = [model(**batch.model_inputs(), **options) for model in self.models]
        logits = outputs[0].logits
        for source, output in enumerate(outputs[1:], 1):
            logits = torch.where((batch.source_ids == source)[..., None], output.logits, logits)
        return Said(_log_probabilities(logits, batch), outputs[0].attentions if self.maps else ())


class PlainCache:
    """What is stored of a position, written out over the whole vocabulary."""

    def __init__(self, teacher: Teacher, vocabulary: int) -> None:
        self.teacher, self.vocabulary = teacher, vocabulary

    @torch.no_grad()
    def signal(self, batch: Batch) -> Said:
        """The stored probabilities, what is pooled among them."""
        (part,) = self.teacher.signal(batch).parts
        stored = part.target
        whole = stored.probabilities.new_zeros(len(stored.ids), self.vocabulary)
        whole.scatter_add_(1, stored.ids.clamp(min=0), stored.probabilities * (stored.ids >= 0))
        if stored.pool is not None:
            shape, mass = stored.pool
            whole += (
                torch.nn.functional.pad(shape, (0, self.vocabulary - len(shape))) * mass[:, None]
            )
        return Said(whole.clamp_min_(1e-30).log_())


@contextlib.contextmanager
def plainly_taught(
    student: Any, teachers: Sequence[Any], *, maps: bool, sources: int
) -> Iterator[None]:
    """Within, `student(inputs=…)` returns the plain loss in the form of the product's learner."""
    forward = student.forward
    attending = [student, *teachers] if maps else []
    for model in attending:
        model.set_attn_implementation("eager")

    def taught(*args: Any, inputs: DistillationInputs | None = None, **kwargs: Any) -> Any:
        if inputs is None:
            return forward(*args, **kwargs)
        options = {"output_attentions": True} if maps else {}
        return _outputs(forward(**inputs.batch.model_inputs(), **options), inputs, sources)

    student.forward = taught
    try:
        yield
    finally:
        vars(student).pop("forward", None)
        for model in attending:
            model.set_attn_implementation("sdpa")


def _outputs(output: Any, inputs: DistillationInputs, sources: int) -> Mapping[str, Any]:
    batch, said = inputs.batch, inputs.signal
    student = _log_probabilities(output.logits, batch)
    loss = kl_div(student, said.log_probabilities, reduction="sum", log_target=True)
    terms = {"prediction": loss.detach()}
    if said.maps:
        compared = _maps_compared(output.attentions, said.maps, batch)
        loss, terms["attention"] = loss + compared, compared.detach()
    columns = Objective([LossTerms(prediction=Prediction())]).columns
    by_source = loss.new_zeros((sources, len(columns)), dtype=torch.float32)
    by_source[0, 0] = batch.supervised.sum()
    return {"loss": loss, "terms": terms, "by_source": by_source}


def _log_probabilities(logits: Tensor, batch: Batch) -> Tensor:
    return logits.float().log_softmax(-1)[batch.supervised]


def _maps_compared(own: Sequence[Tensor], theirs: Sequence[Tensor], batch: Batch) -> Tensor:
    """Σ KL over supervised rows, the mean over heads and layers, step for step as published."""
    length = batch.input_ids.shape[1]
    seen = torch.ones(length, length, device=own[0].device).tril()
    rows = batch.supervised[:, None, :, None]
    total = own[0].new_zeros((), dtype=torch.float32)
    for student, teacher in zip(own, theirs, strict=True):
        logarithms = student.masked_fill(seen == 0, 1e-9).log()
        divergence = kl_div(logarithms, teacher * seen, reduction="none") * rows
        total = total + divergence.sum(dtype=torch.float32) / student.shape[1]
    return total / len(own)
