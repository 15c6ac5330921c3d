"""Which accelerator a plan is for."""

from __future__ import annotations

import psutil
import torch

from dominie.devices import GPUS, Device, gpu_of_this_machine
from dominie.errors import InputError
from dominie.processes.threads import cores

#: Bytes a second between machines, a GPU: one 400 Gb/s network card for each, as in NVIDIA's DGX.
NETWORK = 50e9
#: GPUs of one machine; more than these speak over the network.
PER_MACHINE = 8
#: A CPU core's products a second, by measurement on an EPYC; only to tell hours from weeks.
_CPU_CORE_FLOPS = 40e9


def device_named(name: str | None) -> Device:
    """The device of a plan; without a name, what this machine has.

    Raises:
        InputError: the table has no such device.
    """
    if name is None:
        name = _of_this_machine()
    name = name.lower()
    if name == "cpu":
        flops = _CPU_CORE_FLOPS * cores()
        memory = psutil.virtual_memory().total / 1e9
        return Device("cpu", memory, flops, flops, 20e9, 10e9, "this machine; rates are a guess")
    if name not in GPUS:
        raise InputError(
            "the planner does not know this GPU",
            where="--gpu",
            expected=", ".join([*GPUS, "cpu"]),
            found=name,
            do="name one of these that is like it, and its memory with --memory",
        )
    return GPUS[name]


def device_meant(gpus: int | None, memory: float | None) -> str | None:
    """The GPU that a number or a size in GB speaks of, None where it may be this machine's."""
    if memory is None:
        return None if gpus is None else "h100"
    likest = min(GPUS.values(), key=lambda gpu: abs(gpu.memory - memory))
    is_its_own = abs(likest.memory - memory) <= 0.02 * likest.memory
    elsewhere = gpus is not None or memory > psutil.virtual_memory().total / 1e9
    return likest.name if is_its_own or elsewhere else None


def _of_this_machine() -> str:
    if not torch.cuda.is_available():
        return "cpu"
    found = gpu_of_this_machine()
    return found.name if found else "h100"
