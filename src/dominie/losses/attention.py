"""Attention distillation without attention maps: the function, its autograd node, and the term."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol, cast

import torch
from torch.autograd.function import once_differentiable

from dominie.losses.arguments import obstacle_to_triton
from dominie.losses.attention_backends import Eager, Sdpa, Tiles
from dominie.losses.attention_rows import Projections, Visibility, compute_dtype
from dominie.losses.forward_pass import BySource, ForwardPass
from dominie.losses.objective import Column, Computed, Need, Term

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor

Backend = Literal["auto", "eager", "tiles", "sdpa", "triton"]


class Implementation(Protocol):
    """What a backend provides; neither function is differentiated."""

    def value(self, student: Projections, teacher: Projections, visible: Visibility) -> Tensor:
        """Scalar Σ w · KL."""

    def gradients(
        self, student: Projections, teacher: Projections, visible: Visibility, factor: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Gradient of factor · value with respect to the student's query and key."""


_IMPLEMENTATIONS: dict[str, Implementation] = {"eager": Eager(), "tiles": Tiles(), "sdpa": Sdpa()}


@dataclass(frozen=True)
class AttentionTerm:
    """One teacher's layer, to be matched by some rows of the student's batch.

    Args:
        teacher: query and key of the teacher, batch dimension R.
        visible: weights [R, L] and what is visible, for these rows.
        rows: [R] rows of the student's batch that the teacher's rows stand beside; None for all.
    """

    teacher: Projections
    visible: Visibility
    rows: Tensor | None = None


def attention_divergence(
    student_query: Tensor,
    student_key: Tensor,
    teacher_query: Tensor,
    teacher_key: Tensor,
    *,
    row_weights: Tensor,
    student_scale: float,
    teacher_scale: float,
    sliding_window: int | None = None,
    segment_ids: Tensor | None = None,
    value: bool = True,
    backend: Backend = "auto",
) -> Tensor:
    """Weighted sum over heads and rows of KL(teacher's attention ‖ student's attention).

    Row ``i`` of a head attends with ``A_i = softmax_j(scale · q_i·k_j)``. Returned is
    ``Σ_{b,h,i} row_weights[b,i] · KL(A^t_i ‖ A^s_i)`` in nats, over the student's heads; where the
    teacher has ``g`` heads for each of the student's, the mean over the group ``g·h … g·h+g−1``.
    Key ``j`` is visible to row ``i`` where ``0 ≤ i−j (< sliding_window)`` and their segments agree.
    The gradient flows to the student's query and key. No backend but ``eager`` holds [L, L].
    See Kothari et al. (arXiv 2406.19112) for the loss.

    Args:
        student_query: [B, H_s, L, d_s], after rotary embedding.
        student_key: [B, KV_s, L, d_s]; KV_s divides H_s.
        teacher_query: [B, H_t, L, d_t]; H_s divides H_t.
        teacher_key: [B, KV_t, L, d_t]; KV_t divides H_t.
        row_weights: [B, L]; zero leaves a row out. None weighted: zero loss, zero gradient.
        student_scale: factor of the student's scores.
        teacher_scale: factor of the teacher's scores.
        sliding_window: keys a row sees, itself included (the smaller one where the models differ).
        segment_ids: [B, L] integers.
        value: False leaves the value uncomputed (zero is returned); the gradient is exact.
        backend: ``eager`` maps, the oracle; ``tiles`` rows in blocks, any device; ``sdpa`` stock
            attention kernels; ``triton`` one fused pass; ``auto`` the fastest here.

    Returns:
        A scalar, float64 for float64 inputs, else float32.

    Raises:
        ValueError: shapes that do not fit together, or inputs that are not finite (looked for on
            the CPU, and elsewhere only when the value is computed).
    """
    teacher = Projections(teacher_query, teacher_key, teacher_scale).detached()
    term = AttentionTerm(teacher, Visibility(row_weights, segment_ids, sliding_window))
    return divergence_of_terms(
        student_query, student_key, student_scale, [term], value=value, backend=backend
    )


def divergence_of_terms(
    query: Tensor,
    key: Tensor,
    scale: float,
    terms: Sequence[AttentionTerm],
    *,
    value: bool = True,
    backend: Backend = "auto",
    check_finite: bool = True,
) -> Tensor:
    """Sum of the divergences of one student layer from several teachers, as one autograd node.

    The node saves ``query`` and ``key`` and nothing else, whatever the terms: under activation
    checkpointing the recomputation may pass no terms at all and still match the first pass.

    Args:
        query: [B, H, L, d] of the student.
        key: [B, KV, L, d] of the student.
        scale: factor of the student's scores.
        terms: what to match; none gives zero.
        value: False leaves the value uncomputed.
        backend: see `attention_divergence`.
        check_finite: whether to look for what is not finite on other devices than the CPU, too, if
            the value is computed: each is waited for, layer by layer.

    Returns:
        A scalar.
    """
    with torch.no_grad():  # a check that leaves a node behind would break recomputation
        for term in terms:
            look = (value and check_finite) or query.device.type == "cpu"
            _check(query, key, scale, term, look_for_nan=look)
    implementation = implementation_named(backend, query)
    node = cast("Any", _Divergence)
    return cast("Tensor", node.apply(query, key, scale, tuple(terms), implementation, value))


def implementation_named(backend: str, query: Tensor) -> Implementation:
    """The implementation of a backend; ``auto``: Triton on a GPU where it can, tiles elsewhere."""
    obstacle = obstacle_to_triton(query.device, query.dtype)
    if backend == "auto":
        backend = "tiles"
        if query.device.type == "cuda":
            half = query.dtype in (torch.float16, torch.bfloat16)
            backend = "triton" if obstacle is None else "sdpa" if half else "tiles"
    if backend == "triton":
        if obstacle is not None:
            raise ValueError(f"backend triton cannot run here: {obstacle}")
        return cast("Implementation", import_module("dominie.losses.triton_attention"))
    if backend not in _IMPLEMENTATIONS:
        known = ", ".join(["auto", *_IMPLEMENTATIONS, "triton"])
        raise ValueError(f"backend: expected one of {known}; found {backend!r}")
    return _IMPLEMENTATIONS[backend]


class _Divergence(torch.autograd.Function):
    """Value forward, gradient backward; only the student's query and key are saved."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        scale: float,
        terms: tuple[AttentionTerm, ...],
        implementation: Implementation,
        value: bool,
    ) -> Tensor:
        ctx.save_for_backward(query, key)
        ctx.scale, ctx.terms, ctx.implementation = scale, terms, implementation
        total = torch.zeros((), dtype=compute_dtype(query.dtype), device=query.device)
        if value:
            with torch.autocast(query.device.type, enabled=False):
                for term in terms:
                    student = _student_of(term, query, key, scale)
                    total += implementation.value(student, term.teacher, term.visible)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key = ctx.saved_tensors
        totals: list[Tensor] | None = None
        with torch.autocast(query.device.type, enabled=False):
            for term in ctx.terms:
                student = _student_of(term, query, key, ctx.scale)
                parts = ctx.implementation.gradients(student, term.teacher, term.visible, grad)
                if term.rows is None and len(ctx.terms) == 1:  # nothing to add: no further pass
                    totals = list(parts)
                    break
                totals = totals or _zeros_like(query, key)
                for total, part in zip(totals, parts, strict=True):
                    if term.rows is None:
                        total += part
                    else:
                        total.index_add_(0, term.rows, part.to(total.dtype))
        query_gradient, key_gradient = totals or _zeros_like(query, key)
        return query_gradient.to(query.dtype), key_gradient.to(key.dtype), None, None, None, None


def _zeros_like(query: Tensor, key: Tensor) -> list[Tensor]:
    dtype = compute_dtype(query.dtype)
    return [torch.zeros_like(tensor, dtype=dtype) for tensor in (query, key)]


def _student_of(term: AttentionTerm, query: Tensor, key: Tensor, scale: float) -> Projections:
    student = Projections(query.detach(), key.detach(), scale)
    return student if term.rows is None else student.rows(term.rows)


def _check(
    query: Tensor, key: Tensor, scale: float, term: AttentionTerm, *, look_for_nan: bool
) -> None:
    """Raise ValueError where shapes do not fit together or an input is not finite."""
    teacher, weights = term.teacher, term.visible.row_weights
    rows = query.shape[0] if term.rows is None else term.rows.shape[0]
    length = query.shape[2]
    student = Projections(query, key, scale)
    for name, each, batch in (("student", student, len(query)), ("teacher", teacher, rows)):
        q, k = each.query, each.key
        if q.dim() != 4 or k.dim() != 4 or q.shape[3] != k.shape[3]:
            raise ValueError(
                f"{name}: expected query [B, H, L, d] and key [B, KV, L, d]; "
                f"found {list(q.shape)} and {list(k.shape)}"
            )
        if any((x.shape[0], x.shape[2]) != (batch, length) for x in (q, k)):
            raise ValueError(
                f"{name}: expected {batch} rows of {length} positions; "
                f"found query {list(q.shape)} and key {list(k.shape)}"
            )
        if q.shape[1] % k.shape[1]:
            raise ValueError(
                f"{name}: {q.shape[1]} query heads are not a multiple of {k.shape[1]} key heads"
            )
        if look_for_nan and not bool(torch.isfinite(q).all() & torch.isfinite(k).all()):
            raise ValueError(f"{name}: query or key is not finite")
    if teacher.heads % query.shape[1]:
        raise ValueError(
            f"teacher: {teacher.heads} heads are not a multiple of the student's {query.shape[1]}"
        )
    if weights.shape != (rows, length):
        raise ValueError(f"row_weights: expected {[rows, length]}; found {list(weights.shape)}")
    segments = term.visible.segment_ids
    if segments is not None and segments.shape != (rows, length):
        raise ValueError(f"segment_ids: expected {[rows, length]}; found {list(segments.shape)}")
    if term.visible.sliding_window is not None and term.visible.sliding_window < 1:
        raise ValueError("sliding_window: expected at least 1")


class AttentionLoss:
    """The attention term of all sources; the maps are compared while the student's forward runs."""

    columns: ClassVar[Sequence[Column]] = ()

    def __init__(self, terms: Mapping[str, Sequence[Attention | None]]) -> None:
        self._weights = BySource(each.weight if each else 0.0 for each in terms["attention"])
        #: How maps are compared: the same for all sources but for the weight.
        self.options = next(each for each in terms["attention"] if each and each.weighs)

    def weighs(self, source: int) -> bool:
        """Whether the term adds anything to the loss of a source."""
        return self._weights.values[source] > 0

    def row_weights(
        self, labels: Tensor, source_ids: Tensor, weights: Tensor | None, dtype: torch.dtype
    ) -> Tensor:
        """[B, L] weight of each row of the maps: its source's times its own, 0 if unsupervised."""
        found = self._weights.of_tokens(source_ids, weights, dtype)
        return torch.where(labels >= 0, found, 0.0)

    def __call__(self, forward: ForwardPass) -> Computed:
        """Take over the sum; without metrics its gradient was computed and its value was not."""
        value = forward.hidden.new_zeros(()) if forward.attention is None else forward.attention
        terms = {"attention": value.detach()} if forward.metrics else {}
        return Computed(forward.attention, terms)


@dataclass(frozen=True, kw_only=True)
class Attention(Term):
    """KL between the attention maps of teacher and student, the mean over heads and mapped layers.

    Attributes:
        weight: factor of the term.
        layers: which layers are compared; see `dominie.models.matching.map_layers`. `kept` pairs
            each layer of a student that was pruned with the teacher's layer that it was.
        backend: how it is computed; see `dominie.losses.attention_divergence`.
        row_fraction: share of the supervised rows compared at each step, drawn at random; the
            expected loss is that of all.
        layer_fraction: share of the layer pairs, likewise.
    """

    needs: ClassVar[frozenset[Need]] = frozenset({"attention"})
    computation = AttentionLoss
    weight: float = 1.0
    layers: str | dict[str, int] | list[list[int]] = "all"
    backend: Backend = "auto"
    row_fraction: float = 1.0
    layer_fraction: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("row_fraction", "layer_fraction"):
            if not 0.0 < getattr(self, name) <= 1.0:
                raise ValueError(f"{name} must be above 0 and at most 1, got {getattr(self, name)}")

    @property
    def needs_live_teacher(self) -> bool:
        """Whether the term weighs: no cache keeps attention."""
        return self.weighs
