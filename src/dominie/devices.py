"""What accelerators can do, from their makers' data sheets."""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Device:
    """An accelerator.

    Attributes:
        name: as `--gpu` takes it.
        memory: GB (10⁹ bytes).
        half: dense bf16 products a second with fp32 sums, multiplication and addition counted.
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
        """Products a second in the precision of a run."""
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
    """The table's entry for this machine's GPU; None without one, or where the table lacks it."""
    if not torch.cuda.is_available():
        return None
    words = torch.cuda.get_device_name().lower().replace("rtx ", "rtx")
    # An L40 is no L4, and an A10G no A10.
    named = (gpu for name, gpu in GPUS.items() if re.search(rf"{name}(?![0-9a-z])", words))
    return next(named, None)
