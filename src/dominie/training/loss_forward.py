"""Makes the student's own forward pass return its losses, with fused layers if they are asked for.

DDP, FSDP2 and ZeRO-3 gather parameters and reduce gradients around a module's forward. A head
taken from outside is a shard or empty, and a loss computed outside bypasses the reduction. So the
wrapped model's forward is made to return the loss; called without a batch it is the plain model.

transformers.Trainer puts Liger's layers into the student where `use_liger_kernel` is set. By
default Liger takes the forward's place as well, for a loss of its own; here it is asked for norms,
rotary embedding and gated products alone. Its local teachers get them with it. Rotary embedding is
a function of the family's code, so every model of the family uses the fused one meanwhile.
"""

from __future__ import annotations

import contextlib
import inspect
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dominie.core.errors import InputError
from dominie.data.batch import Batch, to_device
from dominie.losses.attention import AttentionLoss
from dominie.losses.forward_pass import ForwardPass
from dominie.losses.objective import Objective
from dominie.losses.router_losses import routing_sums
from dominie.losses.targets import DenseTarget, Part, Signal
from dominie.losses.tiles import sum_precision
from dominie.losses.vocabulary import vocabulary_losses
from dominie.models.attention_capture import AttentionTarget, StudentAttention
from dominie.models.head import causal_lm, output_head
from dominie.models.info import ModelInfo, info_of
from dominie.models.moe import Routers
from dominie.models.packed_attention import decoder_inputs, use_stock_attention
from dominie.models.placement import is_sharded


@dataclass(frozen=True)
class DistillationInputs:
    """A batch and its distillation targets.

    Attributes:
        batch: the conversations.
        signal: the teachers' targets, None where no source has a teacher.
        measured: whether to compute what does not move the student, too: the attention term's value
            beside its gradient, the teacher's entropy, the agreement.
        base: what the student predicted at the supervised positions before it was trained; None
            measures no forgetting.
    """

    batch: Batch
    signal: Signal | None = None
    measured: bool = True
    base: DenseTarget | None = None


@contextlib.contextmanager
def loss_in_forward(
    model: nn.Module, objective: Objective, layer_pairs: Sequence[tuple[int, int]] = ()
) -> Iterator[None]:
    """Within, `model(inputs=DistillationInputs(…))` returns its losses.

    They are `{"loss": summed loss, "terms": …, "by_source": …, "per_token": …}`, see `Losses`. A
    mixture of experts
    adds `"routing"`, the `routing_sums` of its layers; a base adds `"forgetting"`, the summed
    KL(base ‖ student).

    Args:
        model: a transformers causal language model, or one under peft adapters.
        objective: the loss of the stage.
        layer_pairs: (student layer, teacher layer) compared by the attention term.

    Raises:
        InputError: the loss has a router term and the student no router.
    """
    inner = causal_lm(model)
    plain_forward = inner.forward
    routers = Routers(inner)
    if "router" in objective.needs and not routers:
        raise InputError(
            "the loss has a router term and the student no router",
            where="loss.router",
            expected="a student that is a mixture of experts",
            found=type(inner).__name__,
            do="remove the term, or make a mixture of the student with an upcycle stage",
        )
    attention, term = None, objective.find(AttentionLoss)
    if layer_pairs and term is not None:
        attention = StudentAttention(
            inner,
            layer_pairs,
            backend=term.options.backend,
            row_fraction=term.options.row_fraction,
            layer_fraction=term.options.layer_fraction,
        )

    def forward(*args: Any, inputs: DistillationInputs | None = None, **kwargs: Any) -> Any:
        if "lesson" in kwargs:
            warnings.warn("lesson= is now inputs=", DeprecationWarning, stacklevel=2)
            inputs = kwargs.pop("lesson")
        if inputs is None:
            return plain_forward(*args, **kwargs)
        return _losses(inner, objective, attention, routers, inputs)

    inner.forward = forward
    try:
        yield
    finally:
        for module in (model, inner):
            _unprepare(module)
        routers.detach()
        if attention is not None:
            attention.detach()
        use_stock_attention(inner)


def _unprepare(module: nn.Module) -> None:
    """Give a model its class's forward back, and let the next trainer set its precision.

    accelerate puts autocast around the forward of a model that it has not prepared before.
    """
    for name in ("forward", "_original_forward", "_is_accelerate_prepared"):
        vars(module).pop(name, None)


@contextlib.contextmanager
def without_losses(model: nn.Module) -> Iterator[None]:
    """Within, inside `loss_in_forward`, the model's forward is its own, as `generate` needs it."""
    inner = causal_lm(model)
    forward = vars(inner).pop("forward")
    try:
        yield
    finally:
        inner.forward = forward


def _losses(
    model: Any,
    objective: Objective,
    attention: StudentAttention | None,
    routers: Routers,
    inputs: DistillationInputs,
) -> dict[str, Any]:
    """The losses of a batch, and what its routers did (`routing_sums`)."""
    batch, signal, term = inputs.batch, inputs.signal, objective.find(AttentionLoss)
    maps = [part for part in signal.parts if part.attention] if signal and attention else []
    if attention is not None and term is not None and maps:
        weights = term.row_weights(
            batch.labels, batch.source_ids, batch.weights, sum_precision(model.dtype)
        )
        attention.expect(
            [_attention_target(part, weights, batch, term) for part in maps],
            segment_ids=batch.segment_ids if batch.packed else None,
            value=inputs.measured,
        )
    with routers.recorded() as layers:
        hidden: Tensor = model.get_decoder()(**decoder_inputs(model, batch)).last_hidden_state
    forward = ForwardPass(
        hidden=hidden,
        head=output_head(model),
        labels=batch.labels,
        source_ids=batch.source_ids,
        segment_ids=batch.segment_ids,
        weights=batch.weights,
        signal=signal,
        attention=attention.take() if attention is not None and maps else None,
        routing=layers,
        metrics=inputs.measured,
        scored=batch.positions,
        spans=batch.spans,
    )
    losses = objective(forward)
    outputs = {
        "loss": losses.total,
        "terms": losses.terms,
        "by_source": losses.by_source,
        "per_token": losses.per_token,
    }
    if inputs.base is not None:
        moved = vocabulary_losses(
            forward.supervised_hidden, forward.head, inputs.base, metrics=False
        )
        outputs["forgetting"] = moved.divergence.detach()
    return {**outputs, "routing": routing_sums(layers, forward.real)} if layers else outputs


def _attention_target(
    part: Part, weights: Tensor, batch: Batch, term: AttentionLoss
) -> AttentionTarget:
    """A teacher's attention beside the rows of the student that it teaches, of weights [B, L]."""
    taught, rows = part.rows.tolist(), None
    if taught != list(range(len(weights))):
        rows = to_device(part.rows, weights.device)
        weights = weights[rows]
    counts = any(
        span.supervised and term.weighs(span.source) for span in batch.spans if span.row in taught
    )
    return AttentionTarget(rows, weights, dict(part.attention), counts)


#: What Liger would compute in place of the stage's loss.
_LOSSES = ("cross_entropy", "fused_linear_cross_entropy")
#: Its experts multiply in the dtype of the weights, fp32 in training, whatever autocast says.
_EXPERTS = "swiglu"


def check_fused_layers(arguments: Mapping[str, Any], student: ModelInfo, *, where: str) -> None:
    """Refuse fused layers that this student cannot have here.

    Args:
        arguments: of transformers.TrainingArguments, by name.
        student: that is trained.
        where: the path of `train`.

    Raises:
        InputError: Liger is not installed, does not know the family or a key of the configuration,
            or is asked for a loss or for experts; or there is no GPU.
    """
    given = arguments.get("liger_kernel_config")
    key = f"{where}.use_liger_kernel"
    if not arguments.get("use_liger_kernel"):
        if given is not None:
            raise InputError(
                "fused layers are configured, but not used",
                where=f"{where}.liger_kernel_config",
                do=f"set {key}: true, or remove it",
            )
        return
    families = _families(where=key)
    if student.family not in families:
        raise InputError(
            "Liger has no fused layers for this family",
            where=key,
            expected=", ".join(sorted(families)),
            found=f"{student.family}, of {student.name}",
            do="remove it",
        )
    known = {*inspect.signature(families[student.family]).parameters} - {"model", "kwargs"}
    refused = {*_LOSSES, *([_EXPERTS] if student.experts else [])}
    for name, on in (given or {}).items():
        if name not in known or (on and name in refused):
            raise InputError(
                "this layer of Liger's cannot be used here",
                where=f"{where}.liger_kernel_config.{name}",
                expected=", ".join(sorted(known - refused)),
                found=str(on).lower(),
                do="remove it",
            )
    if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
        raise InputError("fused layers need a GPU", where=key, do="remove it")


def _families(*, where: str) -> dict[str, Callable[..., None]]:
    """By `model_type`, the functions that put Liger's layers into a model."""
    try:
        from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN
    except ImportError as error:
        raise InputError(
            "fused layers need liger-kernel",
            where=where,
            found=str(error),
            do="pip install 'dominie[fused]', or remove it",
        ) from None
    found: dict[str, Callable[..., None]] = MODEL_TYPE_TO_APPLY_LIGER_FN
    return found


@contextlib.contextmanager
def fused_layers(model: nn.Module, arguments: Any, frozen: Sequence[Any] = ()) -> Iterator[None]:
    """Within, a trainer with these arguments may put fused layers into the model, but no loss.

    Frozen models of families that Liger knows get the same layers, unless their layers run in
    another way already (offloaded, sharded, adapters over the student's base). The gated products
    of their experts are compiled, as Liger's would not leave their weights' precision. Afterwards
    the code of the families is as it was, for models that run elsewhere.

    Args:
        model: a causal language model of transformers; adapters may be wrapped around it.
        arguments: whose `liger_kernel_config` is completed.
        frozen: models that run beside it.

    Raises:
        InputError: as `check_fused_layers`.
    """
    if not arguments.use_liger_kernel:
        yield
        return
    inner: Any = causal_lm(model)
    given, student = arguments.liger_kernel_config or {}, info_of(inner.config)
    check_fused_layers(vars(arguments), student, where="train")
    off = dict.fromkeys([*_LOSSES, *([_EXPERTS] if student.experts else [])], False)
    arguments.liger_kernel_config = {**given, **off}
    families = _families(where="train")
    beside = [each for each in frozen if causal_lm(each) is not inner]
    others = [each for each in beside if _can_be_fused(each, families)]
    codes = [vars(sys.modules[type(each).__module__]) for each in (inner, *others)]
    before = [dict(code) for code in codes]
    try:
        for other in others:
            _fuse(other, families[other.config.model_type], given)
        yield
    finally:
        for code, plain in zip(codes, before, strict=True):
            code.update(plain)


def _can_be_fused(model: Any, families: Mapping[str, Any]) -> bool:
    """Whether Liger knows a frozen model's family, and nothing else has replaced its layers."""
    family = getattr(getattr(model, "config", None), "model_type", None)
    replaced = any("forward" in vars(module) for module in model.modules())
    return family in families and not replaced and not is_sharded(model)


def _fuse(model: Any, put: Callable[..., None], given: Mapping[str, Any]) -> None:
    """Put Liger's layers into a frozen model, without a loss."""
    experts = [each for each in model.modules() if hasattr(each, "_apply_gate")]
    chosen = {**given, **dict.fromkeys(_LOSSES, False), **({_EXPERTS: False} if experts else {})}
    known = inspect.signature(put).parameters
    put(model=model, **{name: on for name, on in chosen.items() if name in known})
    for each in experts:  # silu and product of strided halves: two slow passes, one if compiled
        each._apply_gate = torch.compile(each._apply_gate, dynamic=True)
