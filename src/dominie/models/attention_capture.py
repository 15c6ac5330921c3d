"""Attention distillation inside ordinary forward passes: the teacher's kept, the student's scored.

A teacher's forward leaves query and key of the mapped layers behind (`TeacherAttention`). The
student's forward scores its own against them while it runs (`StudentAttention`), so that nothing
of the student is kept beyond what its own backward keeps.

Under non-reentrant activation checkpointing, a layer runs a second time during backward. Each
scoring is one autograd node that saves query and key of the student alone; outside of an expected
forward every call with gradients leaves such a node too, empty. The recomputation therefore takes
the path that the forward took, and is not counted again. Reentrant checkpointing runs the forward
without gradients and would drop the loss silently: refused.
"""

from __future__ import annotations

import logging
import weakref
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from dominie.core.errors import InputError, RunError
from dominie.losses.attention import AttentionTerm, divergence_of_terms
from dominie.losses.attention_rows import Projections, Visibility
from dominie.models.attention_hooks import attach_hook, detach_hook, hooks_of
from dominie.models.matching import check_heads

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

    from torch import Tensor, nn

    from dominie.losses.attention import Backend

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class AttentionTarget:
    """What one teacher's forward left for the rows of the batch that it teaches.

    Args:
        rows: [R] rows of the student's batch; None for all of them, in order.
        row_weights: [R, L] weight of each position; zero leaves it out.
        layers: projections of the teacher's layers, batch dimension R.
        counts: whether any position has a weight; None looks, for which a GPU is waited for.
    """

    rows: Tensor | None
    row_weights: Tensor
    layers: dict[int, Projections]
    counts: bool | None = None

    @property
    def has_rows(self) -> bool:
        """Whether any position has a weight."""
        return bool((self.row_weights != 0).any()) if self.counts is None else self.counts


class TeacherAttention:
    """Keeps query and key of some layers of a teacher, forward by forward.

    Where the teacher shares its modules with a student (adapters over one base), only forwards
    without gradients are the teacher's.

    Args:
        model: a causal language model of transformers.
        layers: numbers of the layers to keep.

    Raises:
        InputError: a layer is missing, or its attention is not a plain causal softmax.
    """

    def __init__(self, model: nn.Module, layers: Collection[int]) -> None:
        self._model = weakref.ref(model)  # or a model with hooks would never be freed
        self._name = type(model).__name__
        self._layers = sorted(set(layers))
        self._kept: dict[int, Projections] = {}
        attach_hook(model, self._layers, self)

    def on_attention(self, layer: int, projections: Projections) -> None:
        """Keep the projections of a whole forward; a step of generation is not one."""
        if projections.query.shape[2] != projections.key.shape[2]:
            return
        if torch.is_grad_enabled() and self._shared:
            return
        self._kept[layer] = projections.detached()

    def take(self) -> dict[int, Projections]:
        """Projections of the last forward by layer, which are then kept no longer."""
        kept, self._kept = self._kept, {}
        missing = [layer for layer in self._layers if layer not in kept]
        if missing:
            raise InputError(
                "the teacher's forward did not pass its attention through transformers",
                where=f"{self._name}, layers {missing}",
                do="set attention: 0, or load the model with attn_implementation: sdpa",
            )
        return kept

    def detach(self) -> None:
        """Give the model its stock attention back."""
        self._kept = {}
        if (model := self._model()) is not None:
            detach_hook(model, self)

    @property
    def _shared(self) -> bool:
        model = self._model()
        hooks = [] if model is None else hooks_of(model)
        return any(isinstance(hook, StudentAttention) for hook in hooks)


@dataclass
class _Expectation:
    """What one forward of the student is scored against, and what it has scored so far."""

    targets: Sequence[AttentionTarget]
    segment_ids: Tensor | None
    value: bool
    with_gradients: bool
    pairs: Sequence[tuple[int, int]]
    scored: dict[int, Tensor] = field(default_factory=dict)
    heads: int = 1
    _visible: dict[tuple[int, int | None], Visibility] = field(default_factory=dict)

    def terms(self, layer: int, student: Projections) -> list[AttentionTerm]:
        """What a layer of the student is matched with."""
        terms = []
        for student_layer, teacher_layer in self.pairs:
            if student_layer != layer:
                continue
            for number, target in enumerate(self.targets):
                teacher = target.layers[teacher_layer]
                windows = (student.sliding_window, teacher.sliding_window)
                smaller = min((each for each in windows if each is not None), default=None)
                visible = self._visibility(number, smaller)
                terms.append(AttentionTerm(teacher, visible, target.rows))
        return terms

    def _visibility(self, number: int, window: int | None) -> Visibility:
        """One object for all layers with the same window: it remembers its plan."""
        if (number, window) not in self._visible:
            target, segments = self.targets[number], self.segment_ids
            if segments is not None and target.rows is not None:
                segments = segments.index_select(0, target.rows)
            self._visible[number, window] = Visibility(
                target.row_weights, segments, window, unbroken=True
            )
        return self._visible[number, window]


class StudentAttention:
    """Scores a student's attention against its teachers' while the student runs.

    Call `expect` before a forward and `take` after it. Any other forward is the stock one.

    Args:
        model: a causal language model of transformers; adapters may be wrapped around it.
        pairs: (student layer, teacher layer) to match, see `matching.map_layers`.
        backend: see `dominie.losses.attention_divergence`.
        row_fraction: share of the weighted rows that each step scores, drawn at random with
            weights scaled so that the expected loss is that of all rows.
        layer_fraction: share of the pairs, likewise.

    Raises:
        InputError: a layer is missing, or its attention is not a plain causal softmax.
    """

    def __init__(
        self,
        model: nn.Module,
        pairs: Sequence[tuple[int, int]],
        *,
        backend: Backend = "auto",
        row_fraction: float = 1.0,
        layer_fraction: float = 1.0,
    ) -> None:
        self._model = weakref.ref(model)  # or a model with hooks would never be freed
        self._name = type(model).__name__
        self._pairs = list(pairs)
        self._backend: Backend = backend
        self._row_fraction = _fraction("row_fraction", row_fraction)
        self._layer_fraction = _fraction("layer_fraction", layer_fraction)
        self._expected: _Expectation | None = None
        self.batches_without_rows = 0
        attach_hook(model, sorted({student for student, _ in self._pairs}), self)

    def expect(
        self, targets: Sequence[AttentionTarget], *, segment_ids: Tensor | None, value: bool
    ) -> None:
        """Score the next forward.

        Args:
            targets: one for each teacher; rows of the batch in none of them are not scored.
            segment_ids: [B, L] of the student's batch, each one run; None if a row is one
                conversation.
            value: False leaves the value uncomputed; gradients are exact either way.
        """
        if value and not any(target.has_rows for target in targets):
            self.batches_without_rows += 1
            if self.batches_without_rows == 1:
                logger.warning("a batch has no row to match attention on; it adds nothing")
        self._expected = _Expectation(
            [self._sampled_rows(target) for target in targets],
            segment_ids,
            value,
            torch.is_grad_enabled(),
            self._sampled_pairs(),
        )

    def on_attention(self, layer: int, projections: Projections) -> None:
        """Score a layer of an expected forward, once."""
        expected = self._expected
        terms: list[AttentionTerm] = []
        if expected is not None:
            if expected.with_gradients and self._training and not torch.is_grad_enabled():
                raise InputError(
                    "reentrant activation checkpointing would drop the attention loss silently",
                    where=f"{self._name}, layer {layer}",
                    do="set gradient_checkpointing_kwargs: {use_reentrant: false}",
                )
            expected.heads = projections.heads
            terms = expected.terms(layer, projections)
            for term in terms:
                check_heads(projections.heads, term.teacher.heads)
        elif not torch.is_grad_enabled():
            return
        try:
            scored = divergence_of_terms(
                projections.query,
                projections.key,
                projections.scale,
                terms,
                value=expected is not None and expected.value,
                backend=self._backend,
                check_finite=False,  # whoever steps looks once a step
            )
        except ValueError as fault:
            raise RunError(
                f"attention cannot be compared: {fault}",
                where=f"{self._name}, layer {layer}",
                do="not finite: lower the learning rate, or use bf16 in place of fp16",
            ) from fault
        if expected is not None:
            expected.scored[layer] = scored

    def take(self) -> Tensor:
        """Scalar Σ_pairs Σ_{b,h,i} w · KL / (heads · pairs) of the forward since `expect`."""
        expected, self._expected = self._expected, None
        if expected is None:
            raise RuntimeError("take() without expect()")
        missing = {student for student, _ in self._pairs} - set(expected.scored)
        if missing:
            raise InputError(
                "the student's forward did not pass its attention through transformers",
                where=f"{self._name}, layers {sorted(missing)}",
                do="set attention: 0, or load the model with attn_implementation: sdpa",
            )
        device = next(iter(expected.scored.values())).device
        total = torch.stack([each.to(device) for each in expected.scored.values()]).sum()
        return total / (expected.heads * len(expected.pairs))

    def detach(self) -> None:
        """Give the model its stock attention back."""
        self._expected = None
        if (model := self._model()) is not None:
            detach_hook(model, self)

    @property
    def _training(self) -> bool:
        model = self._model()
        return model is not None and model.training

    def _sampled_pairs(self) -> list[tuple[int, int]]:
        """The pairs of this step; their mean is an unbiased estimate of the mean over all."""
        count = max(1, round(self._layer_fraction * len(self._pairs)))
        if count == len(self._pairs):
            return self._pairs
        return [self._pairs[i] for i in torch.randperm(len(self._pairs))[:count].tolist()]

    def _sampled_rows(self, target: AttentionTarget) -> AttentionTarget:
        """The target with a random share of its rows, weights scaled by the inverse share."""
        if self._row_fraction == 1.0:
            return target
        kept = torch.rand(target.row_weights.shape, device=target.row_weights.device)
        weights = target.row_weights * (kept < self._row_fraction) / self._row_fraction
        return AttentionTarget(target.rows, weights, target.layers, target.counts)


def _fraction(name: str, share: float) -> float:
    if not 0 < share <= 1:
        raise InputError(
            f"{name} is no share",
            where=f"loss.attention.{name}",
            expected="above 0, at most 1",
            found=str(share),
        )
    return share
