"""Models larger than a device: offloaded, quantised, or sharded over the processes."""

from __future__ import annotations

import contextlib
import importlib
import logging
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn

from dominie.core.errors import InputError
from dominie.models.head import causal_lm, decoder
from dominie.models.spec import Bits, Model

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


def offloaded(model: Any, device: torch.device) -> Any:
    """The model with its layers in main memory, each module on the device while it runs.

    Embeddings, norm and head, which the losses use outside of a forward pass, are on the
    device always.
    """
    from accelerate import cpu_offload

    place_all_but_layers(model, device)
    for layer in decoder(model).layers:
        cpu_offload(layer, execution_device=device)
    return model


def place_all_but_layers(model: Any, device: torch.device) -> None:
    """Move what no layer of the decoder holds to a device."""
    waiting = {id(module) for module in decoder(model).layers.modules()}
    for module in model.modules():
        if id(module) not in waiting:
            for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
                tensor.data = tensor.data.to(device)


logger = logging.getLogger(__name__)

_PACKAGES: dict[Bits, str] = {"8bit": "torchao", "4bit": "bitsandbytes"}


def check_package(bits: Bits, *, where: str, trained: bool = False) -> None:
    """Refuse to quantise without the package that does it, before anything is loaded.

    Args:
        bits: of the weights.
        where: what the message names.
        trained: whether the weights are a student's, under adapters.

    Raises:
        InputError: says what to install.
    """
    package = "bitsandbytes" if trained else _PACKAGES[bits]
    try:
        importlib.import_module(package)
    except ImportError:
        raise InputError(
            f"placement: {bits}{' of a student' if trained else ''} needs {package}",
            where=where,
            do="pip install 'dominie[quantised]'",
        ) from None


@torch.no_grad()
def quantised(model: Any, bits: Bits, device: torch.device) -> Any:
    """The model on a device, the matrices of its layers in 8 or 4 bits.

    A layer at a time is whole on the device; main memory holds the model until then.
    """
    place_all_but_layers(model, device)
    for layer in decoder(model).layers:
        layer.to(device)
        if bits == "8bit":
            _eight_bits(layer)
        else:
            _four_bits(layer)
    if bits == "8bit" and any(p.dim() == 3 for p in decoder(model).layers.parameters()):
        causal_lm(model).set_experts_implementation("eager")  # whose products torchao knows
    return model


def _eight_bits(layer: nn.Module) -> None:
    from torchao.quantization import FqnToConfig, Int8WeightOnlyConfig, quantize_

    rounding = Int8WeightOnlyConfig()
    quantize_(layer, rounding)  # linear layers
    experts = {name: rounding for name, weight in layer.named_parameters() if weight.dim() == 3}
    if experts:
        quantize_(layer, FqnToConfig(experts), filter_fn=None)


def _four_bits(layer: nn.Module) -> None:
    from bitsandbytes.nn.parametrize import replace_parameter_4bit

    found = [
        (module, name)
        for module in layer.modules()
        for name, weight in module.named_parameters(recurse=False)
        if weight.dim() == 3 or (isinstance(module, nn.Linear) and name == "weight")
    ]
    for module, name in found:
        replace_parameter_4bit(module, name, quant_type="nf4", blocksize=64)


def under_adapters(spec: Model) -> Any:
    """How the base under a student's adapters is quantised, by what peft trains them over."""
    if spec.bits is None:
        return None
    from transformers import BitsAndBytesConfig

    check_package(spec.bits, where=spec.path, trained=True)
    return BitsAndBytesConfig(load_in_8bit=spec.bits == "8bit", load_in_4bit=spec.bits == "4bit")


def warn_of_whole_experts(model: Any, spec: Model) -> None:
    """Say how much of a mixture of experts under adapters quantisation does not reach.

    transformers holds the experts of a layer as one tensor, and bitsandbytes replaces linear layers
    alone.
    """
    sizes = [(p.nbytes, p.dim() == 3 and p.is_floating_point()) for p in model.parameters()]
    whole = sum(size for size, expert in sizes if expert)
    if whole:
        logger.warning(
            "%s: placement: %s leaves the experts of a student as they are, %.0f %% of its memory",
            spec.path,
            spec.bits,
            100 * whole / sum(size for size, _ in sizes),
        )


def sharded(model: Any, mesh: DeviceMesh) -> Any:
    """The frozen model with a share of every layer on each process of a mesh of one dimension.

    Embeddings, norm and head, which the losses use outside of a forward pass, are whole.
    """
    from torch.distributed.fsdp import fully_shard

    inner = decoder(model)
    device = torch.device(mesh.device_type)
    place_all_but_layers(model, device)
    pack = {p for layer in inner.layers for p in layer.parameters()}
    for layer in inner.layers:
        fully_shard(layer, mesh=mesh, reshard_after_forward=True)
    # As the root of its layers it fetches the next one while a layer runs.
    fully_shard(inner, mesh=mesh, ignored_params=set(inner.parameters()) - pack)
    return model


def is_sharded(model: Any) -> bool:
    """Whether a forward of the model needs every process."""
    from torch.distributed.fsdp import FSDPModule

    return isinstance(decoder(model), FSDPModule)


@contextlib.contextmanager
def whole_weights(model: Any) -> Iterator[None]:
    """Within, each process holds all weights of a model that FSDP2 cuts up; of others it does so.

    A forward pass then needs no other process, so that each may run as many as it likes. Every
    process has to enter and leave at once.
    """
    from torch.distributed.fsdp import FSDPModule

    cut = [module for module in model.modules() if isinstance(module, FSDPModule)]
    if cut:  # FSDP wants the first forward pass to be that of the whole model
        nothing = torch.zeros(1, 1, dtype=torch.long, device=model.device)
        model(input_ids=nothing, use_cache=False)
    again = [module for module in cut if _is_cut(module)]  # others are whole after a forward pass
    for module in again:
        module.set_reshard_after_forward(False, recurse=False)
        module.unshard()
    try:
        yield
    finally:
        for module in again:
            module.set_reshard_after_forward(True, recurse=False)
        for module in cut:
            module.reshard()


def _is_cut(module: Any) -> bool:
    """Whether weights that this FSDP2 module looks after lie in parts on the processes."""
    from torch.distributed.fsdp import FSDPModule
    from torch.distributed.tensor import DTensor

    inner = [m for m in module.modules() if m is not module and isinstance(m, FSDPModule)]
    theirs = {parameter for each in inner for parameter in cast("nn.Module", each).parameters()}
    return any(isinstance(p, DTensor) for p in module.parameters() if p not in theirs)
