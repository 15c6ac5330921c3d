"""A CUDA device that is not there: tensors that say `cuda:0` over memory of the CPU.

Operations refuse tensors of two devices as CUDA does, and what makes the CPU wait for the device is
noted with the line of source that asked for it. Values are those of the CPU. Nothing here says how
fast a GPU is.
"""

from __future__ import annotations

import contextlib
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map

from dominie.losses import divergence, triton_attention, triton_vocabulary
from dominie.losses.attention_backends import Eager
from dominie.losses.attention_rows import Projections, Visibility

aten = torch.ops.aten
CUDA = torch.device("cuda:0")
CPU = torch.device("cpu")
PACKAGE = str(Path(__file__).parents[1] / "src" / "dominie")
TORCH = str(Path(torch.__file__).parent)

#: CUDA takes tensors of the CPU beside its own here: copies, and indices, which it then copies.
_COPIES = {aten._to_copy.default, aten.copy_.default, aten.copy.default}
_INDEXING = {
    aten.index.Tensor,
    aten.index_put.default,
    aten.index_put_.default,
    aten._index_put_impl_.default,
}
#: Their CUDA versions read a result back before they return.
_WAIT = {
    aten._local_scalar_dense.default,
    aten.nonzero.default,
    aten.masked_select.default,
    aten.equal.default,
    aten.is_nonzero.default,
    aten.bincount.default,
    aten._unique2.default,
    aten.unique_dim.default,
    aten.unique_consecutive.default,
}


_launch_score = triton_vocabulary.score
_launch_value, _launch_gradients = triton_attention.value, triton_attention.gradients
_EAGER = Eager()


@dataclass
class Waits:
    """Waits for the device since it was there, by what waited and the line that asked for it."""

    found: Counter[str] = field(default_factory=Counter)

    def note(self, what: str) -> None:
        """Count a wait that an operation causes."""
        self.found[f"{what} at {_asker()}"] += 1

    def take(self) -> Counter[str]:
        """Those since this was called last."""
        found, self.found = self.found, Counter()
        return found


def _asker() -> str:
    """The innermost line of the package on the stack, and that of another library it called."""
    frame, library = sys._getframe(), ""
    while frame is not None:
        file = frame.f_code.co_filename
        line = f"{Path(file).name}:{frame.f_lineno}"
        if file.startswith(PACKAGE):
            return f"{line}, in {library}" if library else line
        if not library and file != __file__ and TORCH not in file:
            library = line
        frame = frame.f_back
    return library


class CudaTensor(Tensor):
    """Says that it is on the device; `values` are on the CPU.

    Below Python it is on the CPU, so that torch need not be built for CUDA; `device`, and what
    depends on it, is answered here.
    """

    values: Tensor

    @staticmethod
    def __new__(cls, values: Tensor) -> CudaTensor:
        made = Tensor._make_wrapper_subclass(
            cls,
            values.size(),
            strides=values.stride(),
            storage_offset=values.storage_offset(),
            dtype=values.dtype,
            layout=values.layout,
            device=CPU,
        )
        made.values = values
        return made

    def __repr__(self, **_: Any) -> str:
        return f"CudaTensor({self.values})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise RuntimeError(f"{func} on a tensor of a device that is gone")

    device = property(lambda self: CUDA)
    is_cuda = property(lambda self: True)
    is_cpu = property(lambda self: False)
    data = property(
        lambda self: self.detach(), lambda self, new: setattr(self, "values", new.values)
    )

    def get_device(self) -> int:
        """The number of the device."""
        return 0

    def to(self, *args: Any, **kwargs: Any) -> Tensor:
        """As `Tensor.to`: a copy to the CPU, or another dtype."""
        if args and isinstance(args[0], Tensor):
            return self.to(args[0].device, args[0].dtype)
        options: dict[str, Any] = {"copy": kwargs.pop("copy", False)}
        device, dtype, _, options["memory_format"] = torch._C._nn._parse_to(*args, **kwargs)
        if device is not None and torch.device(device).type == "cpu":
            return _to_cpu(self, dtype or self.dtype)
        return super().to(dtype or self.dtype, **options)

    def cpu(self, *_: Any, **__: Any) -> Tensor:
        """A copy on the CPU."""
        return self.to(CPU)

    def new_tensor(self, data: Any, *, dtype: Any = None, device: Any = None) -> Tensor:
        """A tensor that is made on the CPU and copied."""
        return torch.tensor(data, dtype=dtype or self.dtype, device=device or CUDA)

    def tolist(self) -> Any:
        """A copy to the CPU."""
        return self.cpu().tolist()

    def numpy(self, *_: Any, **__: Any) -> Any:
        """What torch says of every tensor on CUDA."""
        raise TypeError("can't convert cuda:0 device type tensor to numpy; use Tensor.cpu() first")


_leaving: list[Tensor] = []


def _to_cpu(tensor: CudaTensor, dtype: torch.dtype) -> Tensor:
    """A copy on the CPU. What autograd asks to have there is on the device, see `CudaTensor`."""
    _leaving.append(tensor)
    try:
        return aten._to_copy(tensor, dtype=dtype, device=CPU)
    finally:
        _leaving.pop()


class _Device(TorchDispatchMode):
    """Runs every operation on the values, where the device would."""

    def __init__(self, waits: Waits) -> None:
        super().__init__()
        self.waits = waits

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        on_device = [tensor for tensor in tensors if isinstance(tensor, CudaTensor)]
        asked = kwargs.get("device")
        target = None if asked is None else torch.device(asked)
        if on_device and target == CPU and not _leaving:
            target = CUDA
        if on_device and func not in _COPIES:
            self._refuse_mixture(func, args, kwargs)
        self._note_waits(func, args, {**kwargs, "device": target}, on_device)
        if target is not None:
            kwargs["device"] = CPU
        if kwargs.get("pin_memory"):
            kwargs["pin_memory"] = False
        values = tree_map(_values, args)
        found = _run(func, values, tree_map(_values, kwargs))
        written = _written(func, args, kwargs)
        if written is not None:
            return written
        to_device = bool(on_device) if target is None else target.type == "cuda"
        return tree_map(_on_device, found) if to_device else found

    def _refuse_mixture(self, func: Any, args: Any, kwargs: Any) -> None:
        indices = args[1] if func in _INDEXING else ()
        used = [args[0], *args[2:]] if func in _INDEXING else [args, kwargs]
        if other := _of_the_cpu(used):
            raise RuntimeError(
                "Expected all tensors to be on the same device, but found at least two devices, "
                f"cuda:0 and cpu! {func} was given {[list(t.shape) for t in other]} on the CPU, "
                f"at {_asker()}"
            )
        for _ in _of_the_cpu(indices):
            self.waits.note("copy of an index")

    def _note_waits(self, func: Any, args: Any, kwargs: Any, on_device: Sequence[Tensor]) -> None:
        if func in _WAIT and on_device:
            self.waits.note(func.overloadpacket.__name__)
        if func is aten.repeat_interleave.Tensor and on_device and not kwargs.get("output_size"):
            self.waits.note("repeat_interleave")
        if func in _INDEXING and on_device:
            masks = [i for i in args[1] if i is not None and i.dtype in (torch.bool, torch.uint8)]
            filled = len(args) > 2 and args[2].numel() == 1  # `masked_fill`, which knows its shape
            if masks and not filled:
                self.waits.note("a mask as an index")
        if func in _COPIES:
            self._note_copy(func, args, kwargs)

    def _note_copy(self, func: Any, args: Any, kwargs: Any) -> None:
        if func is aten._to_copy.default:
            source, asked = args[0], kwargs.get("device")
            to_device = (
                isinstance(source, CudaTensor)
                if asked is None
                else torch.device(asked).type == "cuda"
            )
            queued = kwargs.get("non_blocking", False)
        else:
            source, to_device = args[1], isinstance(args[0], CudaTensor)
            queued = args[2] if len(args) > 2 else kwargs.get("non_blocking", False)
        if isinstance(source, CudaTensor) and not to_device:
            self.waits.note("copy to the CPU")
        elif to_device and not isinstance(source, CudaTensor):
            pinned = getattr(source, "pinned_here", False)
            if not (queued and pinned):
                why = "pageable memory" if queued else "the CPU"
                self.waits.note(f"copy from {why}")


def _of_the_cpu(arguments: Any) -> list[Tensor]:
    """The tensors among arguments that are on the CPU; a number is on no device."""
    leaves = [leaf for leaf in tree_leaves(arguments) if isinstance(leaf, Tensor)]
    return [leaf for leaf in leaves if leaf.dim() and not isinstance(leaf, CudaTensor)]


def _run(func: Any, args: Any, kwargs: Any) -> Any:
    """The operation on values; those that only a GPU has in terms of others."""
    name = func.overloadpacket.__name__
    if name in ("mm", "bmm", "addmm", "baddbmm") and "dtype" in func._overloadname:
        return _product(name, args, kwargs)
    if name == "histc" and not args[0].is_floating_point():
        return func(args[0].double(), *args[1:], **kwargs).to(args[0].dtype)
    return func(*args, **kwargs)


def _product(name: str, args: Any, kwargs: Any) -> Tensor:
    """A product of 16-bit factors whose float32 sums are not rounded."""
    *added, a, b = (x for x in args if isinstance(x, Tensor))
    found = (a.float() @ b.float()) * kwargs.get("alpha", 1)
    if added and kwargs.get("beta", 1):
        found = found + kwargs.get("beta", 1) * added[0].float()
    out = kwargs.get("out")
    return found if out is None else out.copy_(found)


def _values(leaf: Any) -> Any:
    return leaf.values if isinstance(leaf, CudaTensor) else leaf


def _on_device(leaf: Any) -> Any:
    return CudaTensor(leaf) if isinstance(leaf, Tensor) else leaf


def _written(func: Any, args: Any, kwargs: Any) -> Any:
    """The arguments that an operation writes to and returns; None if it returns others."""
    schema = func._schema
    if not any(each.alias_info is not None and each.alias_info.is_write for each in schema.returns):
        return None
    given = dict(zip([each.name for each in schema.arguments], args, strict=False)) | kwargs
    found = [
        given[each.name]
        for each in schema.arguments
        if each.alias_info is not None and each.alias_info.is_write and each.name in given
    ]
    return found[0] if len(found) == 1 else tuple(found)


class _Kernel:
    """In place of a Triton kernel: is launched, and does nothing."""

    def __getitem__(self, grid: Any) -> Any:
        return lambda *_, **__: None


def _score(tile: Any, terms: Any) -> None:
    """Launches the kernel of the vocabulary losses, and computes what it would with torch."""
    _launch_score(tile, terms)
    divergence.score(tile, terms)


def _attention_value(student: Any, teacher: Any, visible: Any) -> Tensor:
    """Launches the kernels of the attention divergence, and computes their value with torch."""
    _launch_value(student, teacher, visible)
    with _disable_current_modes():
        return CudaTensor(_EAGER.value(*_on_cpu(student, teacher, visible)))


def _attention_gradients(student: Any, teacher: Any, visible: Any, factor: Tensor) -> Any:
    """Launches the kernels of its gradients, and computes them with torch."""
    _launch_gradients(student, teacher, visible, factor)
    with _disable_current_modes():
        parts = _EAGER.gradients(*_on_cpu(student, teacher, visible), _values(factor))
        return tuple(CudaTensor(part) for part in parts)


def _on_cpu(student: Any, teacher: Any, visible: Any) -> list[Any]:
    """The arguments of an attention backend with their values."""
    found: list[Any] = [
        Projections(_values(each.query), _values(each.key), each.scale, each.sliding_window)
        for each in (student, teacher)
    ]
    segments = None if visible.segment_ids is None else _values(visible.segment_ids)
    weights = _values(visible.row_weights)
    return [*found, Visibility(weights, segments, visible.sliding_window)]


class _Autocast(contextlib.ContextDecorator):
    """Autocast of the device, and of the CPU that computes in its place."""

    def __init__(self, device_type: str, *args: Any, **kwargs: Any) -> None:
        kinds = ("cuda", "cpu") if device_type == "cuda" else (device_type,)
        self.parts = [_real_autocast(kind, *args, **kwargs) for kind in kinds]

    def __enter__(self) -> None:
        for part in self.parts:
            part.__enter__()

    def __exit__(self, *error: Any) -> None:
        for part in reversed(self.parts):
            part.__exit__(*error)


_real_autocast = torch.autocast


def _pin(tensor: Tensor, *_: Any) -> Tensor:
    """A copy that a copy to the device need not be waited for."""
    pinned = tensor.clone()
    pinned.pinned_here = True  # type: ignore[attr-defined]
    return pinned


@contextlib.contextmanager
def simulated_cuda() -> Iterator[Waits]:
    """Within, `cuda:0` is a device. Triton's kernels are launched there and computed by torch."""
    waits = Waits()
    properties = SimpleNamespace(
        name="NVIDIA H100",
        major=9,
        minor=0,
        shared_memory_per_block_optin=227 * 1024,
        total_memory=80 * 10**9,
    )
    with contextlib.ExitStack() as stack:
        for place, name, new in (
            (torch.cuda, "_lazy_init", lambda: None),
            (torch.cuda, "is_bf16_supported", lambda *_, **__: True),
            (torch.cuda, "device_count", lambda: 1),
            (torch.cuda, "current_device", lambda: 0),
            (torch.accelerator, "is_available", lambda: True),
            (torch.accelerator, "current_accelerator", lambda *_, **__: None),
            (torch.cuda, "device_of", lambda _: contextlib.nullcontext()),
            (torch.cuda, "get_device_properties", lambda _=None: properties),
            (torch.cuda, "synchronize", lambda *_: waits.note("synchronize")),
            (torch.cuda, "get_rng_state", lambda *_: torch.zeros(16, dtype=torch.uint8)),
            (torch.cuda, "set_rng_state", lambda *_: None),
            (torch, "autocast", _Autocast),
            (torch._C, "_group_tensors_by_device_and_dtype", _grouped),
            (torch, "tensor", _tensor),
            (nn.functional, "one_hot", _one_hot),
            (nn.Module, "to", _module_to),
            (triton_vocabulary, "_score_token", _Kernel()),
            (triton_vocabulary, "score", _score),
            (triton_attention, "statistics", _Kernel()),
            (triton_attention, "query_gradient", _Kernel()),
            (triton_attention, "key_gradient", _Kernel()),
            (triton_attention, "value", _attention_value),
            (triton_attention, "gradients", _attention_gradients),
            (Tensor, "pin_memory", _pin),
        ):
            stack.enter_context(mock.patch.object(place, name, new))
        stack.enter_context(_Device(waits))
        yield waits


def to_cuda(model: nn.Module) -> nn.Module:
    """Moves a model's parameters and buffers to the device; shared ones stay shared."""
    moved: dict[int, Tensor] = {}
    for module in model.modules():
        for place in (module._parameters, module._buffers):
            for name, tensor in place.items():
                if tensor is None or isinstance(tensor, CudaTensor):
                    continue
                if id(tensor) not in moved:
                    there: Tensor = CudaTensor(tensor.detach())
                    if isinstance(tensor, nn.Parameter):
                        there = nn.Parameter(there, tensor.requires_grad)
                    moved[id(tensor)] = there
                place[name] = moved[id(tensor)]
    return model


_real_tensor = torch.tensor


def _tensor(data: Any, *, device: Any = None, **kwargs: Any) -> Tensor:
    """`torch.tensor`, whose copy to a device no mode sees."""
    made = _real_tensor(data, **kwargs)
    return made if device is None else made.to(device)


def _one_hot(index: Tensor, classes: int) -> Tensor:
    """As CUDA has it, which does not look at the values first."""
    found = index.new_zeros((*index.shape, classes))
    return found.scatter_(-1, index[..., None], 1)


_real_grouped = torch._C._group_tensors_by_device_and_dtype


def _grouped(lists: Any, *args: Any) -> Any:
    """Groups of tensors, their device as Python sees it."""
    there = isinstance(lists[0][0], CudaTensor)
    groups = _real_grouped(lists, *args).items()
    return {(CUDA if there else device, dtype): rest for (device, dtype), rest in groups}


_real_module_to = nn.Module.to


def _module_to(module: nn.Module, *args: Any, **kwargs: Any) -> nn.Module:
    """`Module.to`, which else would put a tensor of the device into a parameter of the CPU."""
    device, dtype, *_ = torch._C._nn._parse_to(*args, **kwargs)
    if device is None or device.type != "cuda":
        return _real_module_to(module, *args, **kwargs)
    return to_cuda(module if dtype is None else _real_module_to(module, dtype))
