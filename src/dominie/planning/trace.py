"""Bytes of a forward and backward pass, counted by running it on tensors without storage.

The model itself runs, under PyTorch's fake tensors: whatever its family saves for its backward
pass, whatever autocast copies and checkpointing recomputes is counted, not estimated. What is
linear in the number of layers is taken from two short models and extended.
"""

from __future__ import annotations

import contextlib
import copy
import weakref
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dominie.models.adapters import with_lora
from dominie.models.head import causal_lm
from dominie.models.info import info_of
from dominie.models.loading import DTYPES
from dominie.models.moe import follow_autocast
from dominie.models.pruning import layer_changes
from dominie.planning.counted import counted
from dominie.training.settings import Lora


def with_layers(config: Any, layers: int) -> Any:
    """The configuration of the same model with fewer layers."""
    cut = copy.deepcopy(config)
    changed = layer_changes(vars(config), config.num_hidden_layers, range(layers))
    for key, value in changed.items():
        setattr(cut, key, value)
    return cut


#: Layers of the two models that are run in place of a deeper one.
_SHORT = (2, 4)


@dataclass(frozen=True)
class Traced:
    """Bytes of a model and of a pass over [rows, length] tokens.

    Attributes:
        parameters: number of weights.
        trainable: number of weights that get a gradient.
        weights: bytes of all weights.
        gradients: bytes of the trainable ones' gradients.
        casts: copies of weights in the precision of the run that a forward pass holds.
        kept_casts: those that the backward pass waits for.
        activations: kept between forward and backward, casts apart.
        forward: most that the forward pass holds beyond weights and gradients.
        backward: the same of the backward pass.
    """

    parameters: float
    trainable: float
    weights: float
    gradients: float
    casts: float
    kept_casts: float
    activations: float
    forward: float
    backward: float


@dataclass(frozen=True)
class Pass:
    """What is run: a training pass, or a frozen model's.

    Attributes:
        rows: of the batch.
        length: tokens of a row.
        dtype: of the weights.
        autocast: precision of the run if it is not that of the weights.
        trained: whether there is a backward pass.
        lora: adapters on top of the weights.
        checkpointing: whether layers are recomputed in the backward pass.
    """

    rows: int
    length: int
    dtype: str
    autocast: str | None = None
    trained: bool = False
    lora: Lora | None = None
    checkpointing: bool = False


def traced(config: Any, run: Pass) -> Traced:
    """The bytes of a pass over a model of this configuration."""
    return counted(config, repr(run), lambda: _traced(config, run), Traced)


def _traced(config: Any, run: Pass) -> Traced:
    whole = config.num_hidden_layers
    short, longer = _SHORT
    if whole <= longer or not _alike(config):
        return _trace(config, run)
    few, more = (_trace(with_layers(config, layers), run) for layers in _SHORT)
    return _extended(few, more, (whole - short) / (longer - short))


def _alike(config: Any) -> bool:
    """Whether all layers are of one kind, so that two are as good as many."""
    kinds = [v for v in vars(config).values() if isinstance(v, list)]
    per_layer = [v for v in kinds if len(v) == config.num_hidden_layers]
    first_dense = getattr(config, "first_k_dense_replace", 0) or getattr(
        config, "mlp_only_layers", None
    )
    return not first_dense and all(len(set(map(str, kind))) == 1 for kind in per_layer)


def _extended(few: Traced, more: Traced, steps: float) -> Traced:
    values = {f.name: (getattr(few, f.name), getattr(more, f.name)) for f in fields(Traced)}
    return Traced(**{name: a + (b - a) * steps for name, (a, b) in values.items()})


def _trace(config: Any, run: Pass) -> Traced:
    model = bare_model(config, run)
    with FakeTensorMode(), LiveBytes() as live:
        _give_fake_tensors(model)
        live.parameters = {p.untyped_storage() for p in model.parameters()}
        trainable = [p for p in model.parameters() if p.requires_grad]
        gradients = sum(p.numel() * p.element_size() for p in trainable)
        for parameter in trainable if run.trained else ():  # as every micro-batch but the first
            parameter.grad = torch.empty_like(parameter)
        before = live.now
        peaks: dict[str, int] = {}
        precision = DTYPES[run.autocast or "bf16"]
        with (
            live.peak_of("forward", peaks),
            torch.autocast("cpu", precision, enabled=run.autocast is not None),
        ):
            hidden = _hidden(model, run)
            casts = live.casts
        kept, kept_casts = live.now - before, live.casts
        if run.trained:
            with live.peak_of("backward", peaks):
                torch.autograd.backward([hidden], [torch.empty_like(hidden)])
        return Traced(
            parameters=sum(p.numel() for p in model.parameters()),
            trainable=sum(p.numel() for p in trainable) if run.trained else 0,
            weights=sum(p.numel() * p.element_size() for p in model.parameters()),
            gradients=gradients if run.trained else 0,
            casts=casts,
            kept_casts=kept_casts,
            activations=kept - kept_casts if run.trained else 0,
            forward=peaks["forward"] - before,
            backward=peaks.get("backward", before) - before,
        )


def bare_model(config: Any, run: Pass) -> Any:
    """The model of a pass on the meta device: shapes and no storage."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        # SDPA where the family has it: Gemma 2 and gpt-oss have none.
        model = AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=DTYPES[run.dtype])
        if not run.trained:
            return model.requires_grad_(False).eval()
        model.train()
        if run.lora is None:
            follow_autocast(model)
        if run.checkpointing:
            model.gradient_checkpointing_enable(
                gradient_checkpointing_kwargs={"use_reentrant": False}
            )
        return model if run.lora is None else with_lora(model, run.lora, where="train.lora")


def _give_fake_tensors(model: Any) -> None:
    """Put fake tensors of the CPU, which autocast knows, in the place of those of meta."""
    made: dict[Tensor, Tensor] = {}  # tied weights stay tied

    def fake(tensor: Tensor) -> Tensor:
        if tensor not in made:
            empty = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
            is_weight = isinstance(tensor, nn.Parameter)
            made[tensor] = nn.Parameter(empty, tensor.requires_grad) if is_weight else empty
        return made[tensor]

    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                tensors[name] = tensor if tensor is None else fake(tensor)


def _hidden(model: Any, run: Pass) -> Tensor:
    ids = torch.zeros(run.rows, run.length, dtype=torch.int64)
    with torch.set_grad_enabled(run.trained):
        output = causal_lm(model).get_decoder()(input_ids=ids, use_cache=False)
    hidden: Tensor = output.last_hidden_state
    return hidden


def router_loss_memory(config: Any, tokens: int) -> tuple[float, float]:
    """Bytes of `dominie.losses.router_losses.router_loss` over the layers of a student, in fp32.

    Args:
        config: of the student.
        tokens: of a micro-batch, padding and all.

    Returns:
        Those kept for the backward pass, and working memory beside them.
    """
    info = info_of(config)
    if info.experts is None or info.layers is None:
        return 0.0, 0.0
    experts, chosen = info.experts, info.experts_per_token or 0
    logits = tokens * experts * 4.0  # without padding; of these the log-sum-exp
    softmax = 0.0 if chosen == experts else logits  # nothing to balance if all are chosen
    one_hot = 0.0 if chosen == experts else tokens * chosen * experts * (8.0 + 4.0)
    return info.layers * (logits + softmax), one_hot


class LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of all tensors that are alive, by their storages."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.peak = self.casts = 0
        self.parameters: set[Any] = set()
        self._seen: weakref.WeakSet[Any] = weakref.WeakSet()

    @contextlib.contextmanager
    def peak_of(self, name: str, peaks: dict[str, int]) -> Iterator[None]:
        """Within, note the most bytes alive at once."""
        self.peak = self.now
        yield
        peaks[name] = self.peak

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Run an operator and look at what it made."""
        made = _made(func, args, dict(kwargs or {}))
        is_cast = func is torch.ops.aten._to_copy.default and (
            args[0].untyped_storage() in self.parameters
        )
        for tensor in tree_leaves(made):
            if isinstance(tensor, Tensor):
                self._see(tensor.untyped_storage(), is_cast)
        return made

    def _see(self, storage: Any, is_cast: bool) -> None:
        if storage in self._seen:
            return
        self._seen.add(storage)
        size = storage.nbytes()
        self._count(size, is_cast)
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._count, -size, is_cast)

    def _count(self, size: int, is_cast: bool) -> None:
        self.now += size
        self.casts += size if is_cast else 0


def _made(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The operator's result.

    PyTorch knows the shapes of a mixture's grouped matrix products in bf16 alone; in other dtypes
    an empty tensor of that shape stands in for them.
    """
    if func is torch.ops.aten._grouped_mm.default and args[0].dtype != torch.bfloat16:
        a, b, groups = args[0], args[1], args[2]
        shape = (len(groups), a.shape[0], b.shape[1]) if b.dim() == 2 else (a.shape[0], b.shape[2])
        return a.new_empty(shape)
    return func(*args, **kwargs)
