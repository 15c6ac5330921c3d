"""Accelerators by their data sheets, the one a plan is for, CPU threads, freed memory, versions."""

from __future__ import annotations

import ctypes
import functools
import importlib.metadata
import os
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

import psutil
import torch

from dominie import __version__
from dominie.core.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable


@dataclass(frozen=True)
class Device:
    """An accelerator.

    Attributes:
        name: as `--gpu` takes it.
        memory: GB (10⁹ bytes).
        half: dense bf16 FLOPs a second with fp32 sums.
        single: the same in fp32, without TF32.
        bandwidth: bytes a second of its memory.
        link: bytes a second to the others of its machine, one way.
        source: where the figures stand.
    """

    name: str
    memory: float
    half: float
    single: float
    bandwidth: float
    link: float
    source: str

    @property
    def is_cpu(self) -> bool:
        """Whether this is no accelerator at all."""
        return self.name == "cpu"

    def flops(self, precision: str) -> float:
        """FLOPs a second in the precision of a run."""
        return self.single if precision == "fp32" else self.half


GPUS = {
    gpu.name: gpu
    for gpu in (
        Device("b200", 180, 2.25e15, 75e12, 8.0e12, 900e9, "NVIDIA HGX B200 data sheet"),
        Device("h200", 141, 989e12, 67e12, 4.8e12, 450e9, "NVIDIA H200 (SXM) data sheet"),
        Device("h100", 80, 989e12, 67e12, 3.35e12, 450e9, "NVIDIA H100 (SXM) data sheet"),
        Device("a100", 80, 312e12, 19.5e12, 2.04e12, 300e9, "NVIDIA A100 80GB (SXM) data sheet"),
        Device("a100-40", 40, 312e12, 19.5e12, 1.56e12, 300e9, "NVIDIA A100 40GB data sheet"),
        Device("mi300x", 192, 1307e12, 163e12, 5.3e12, 448e9, "AMD Instinct MI300X data sheet"),
        Device("l40s", 48, 362e12, 91.6e12, 0.86e12, 32e9, "NVIDIA L40S data sheet"),
        Device("rtx4090", 24, 165e12, 82.6e12, 1.01e12, 32e9, "NVIDIA Ada architecture paper"),
        Device("a10", 24, 125e12, 31.2e12, 0.60e12, 32e9, "NVIDIA A10 data sheet"),
        Device("l4", 24, 121e12, 30.3e12, 0.30e12, 32e9, "NVIDIA L4 data sheet"),
    )
}


def gpu_of_this_machine() -> Device | None:
    """The table's entry for this machine's GPU; None without one, or if the table lacks it."""
    if not torch.cuda.is_available():
        return None
    name = torch.cuda.get_device_name().lower().replace("rtx ", "rtx")
    # An L40 is no L4, and an A10G no A10.
    named = (gpu for key, gpu in GPUS.items() if re.search(rf"{key}(?![0-9a-z])", name))
    return next(named, None)


def cores() -> int:
    """The cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def use_free_cores(threads: int | None = None) -> int:
    """Give torch as many threads as cores are free, or the number an interrupted stage began with.

    Two threads when one core is busy ran 8 to 10 times slower than one. `OMP_NUM_THREADS` is
    obeyed.

    Returns:
        The number chosen.
    """
    if "OMP_NUM_THREADS" in os.environ or torch.cuda.is_available():
        return torch.get_num_threads()
    if threads is None:
        busy = psutil.cpu_percent(interval=0.2) / 100 * (psutil.cpu_count() or 1)
        threads = max(1, round(cores() - busy))
    torch.set_num_threads(threads)
    return threads


#: Share of the roofline that well-written training reaches; `--efficiency` sets it.
EFFICIENCY = 0.4
#: Bytes a second between machines, a GPU: one 400 Gb/s network card for each, as in NVIDIA's DGX.
NETWORK = 50e9
#: GPUs of one machine; more than these use the network.
PER_MACHINE = 8
#: A CPU core's FLOPs a second, by measurement on an EPYC; only to tell hours from weeks.
_CPU_CORE_FLOPS = 40e9


def device_named(name: str | None) -> Device:
    """The device of a plan; without a name, what this machine has.

    Raises:
        InputError: the table has no such device.
    """
    if name is None:
        found = gpu_of_this_machine()
        name = found.name if found else "h100" if torch.cuda.is_available() else "cpu"
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
    """The GPU that a number or a size in GB means; None if it may be this machine's."""
    if memory is None:
        return None if gpus is None else "h100"
    likest = min(GPUS.values(), key=lambda gpu: abs(gpu.memory - memory))
    is_its_own = abs(likest.memory - memory) <= 0.02 * likest.memory
    elsewhere = gpus is not None or memory > psutil.virtual_memory().total / 1e9
    return likest.name if is_its_own or elsewhere else None


@dataclass(frozen=True)
class Machine:
    """What a recipe is planned for.

    Attributes:
        device: each accelerator.
        count: how many.
        memory: bytes of each.
        sharded: whether weights are sharded over them; a single one holds all.
        price: of one for an hour, None if money is not asked for.
        efficiency: share of the roofline that training is taken to reach.
    """

    device: Device
    count: int
    memory: float
    sharded: bool
    price: float | None = None
    efficiency: float = EFFICIENCY


def machine(
    *,
    gpu: str | None = None,
    gpus: int | None = None,
    memory: float | None = None,
    price: float | None = None,
    sharded: bool = True,
    efficiency: float = EFFICIENCY,
) -> Machine:
    """What the options of the command line mean.

    Args:
        gpu: a name of the table; without it the one that `gpus` and `memory` mean, else what
            this machine has.
        memory: GB (10⁹ bytes) of each; the device's own without it.
        price: of a GPU hour.
        sharded: whether several share weights, gradients and optimiser.
        efficiency: share of the roofline.

    Raises:
        InputError: a GPU that is not known, or a number that is none.
    """
    for option, value in (("--gpus", gpus), ("--memory", memory), ("--price", price)):
        if value is not None and not 0 < value < float("inf"):
            raise InputError(
                "this cannot be planned for",
                where=option,
                expected="a number above 0",
                found=f"{value:g}",
            )
    if not 0 < efficiency <= 1:
        raise InputError(
            "no share of the roofline",
            where="--efficiency",
            expected="above 0, at most 1",
            found=f"{efficiency:g}",
        )
    device = device_named(gpu or device_meant(gpus, memory))
    count = gpus or 1
    gigabytes = device.memory if memory is None else memory
    return Machine(device, count, gigabytes * 1e9, sharded and count > 1, price, efficiency)


def versions(packages: Iterable[str]) -> dict[str, str]:
    """Versions of installed packages; dominie's also where it runs from its source folder."""
    return {
        package: __version__ if package == "dominie" else importlib.metadata.version(package)
        for package in packages
    }


def trim_memory() -> None:
    """Return freed memory to the system, where the C library is glibc; elsewhere do nothing."""
    trim = _malloc_trim()
    if trim is not None:
        trim(0)


@functools.cache
def _malloc_trim() -> Callable[[int], int] | None:
    try:
        found = ctypes.CDLL(None).malloc_trim
    except (OSError, AttributeError, TypeError):  # no glibc
        return None
    found.argtypes, found.restype = [ctypes.c_size_t], ctypes.c_int
    return found
