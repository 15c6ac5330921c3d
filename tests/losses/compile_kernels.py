"""Compile the kernels for an H100 or H200, which takes no GPU, and tell what each takes there.

The losses' own code launches them, in every configuration that it has; the launch is answered by a
driver that says it has such a GPU, and stops at the compiled kernel. Prints a JSON object a kernel,
or a table.

    python tests/losses/compile_kernels.py [--table] [case …]
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from dataclasses import astuple
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from dominie.losses import triton_attention as attention
from dominie.losses import triton_vocabulary as vocabulary
from dominie.losses.attention_rows import Projections, Visibility
from dominie.losses.divergence import KINDS, PerToken, Terms, Tile, Weighted
from dominie.losses.triton_attention_blocks import VARIABLE, Shape, candidates

HALF, SINGLE = torch.bfloat16, torch.float32
#: Arguments of `attention_layer` and `vocabulary_tile` by case; the first of each is the paper's.
ATTENTION = {
    "heads of 128": {},
    "heads of 128, packed": {"segments": "packed"},
    "heads of 128, odd length": {"length": 2047},
    "heads of 128, segments in pieces, window": {"segments": "broken", "window": 512},
    "heads of 128, two teacher heads to one": {"teacher_heads": 64},
    "heads of 128, teacher's of 64": {"teacher_width": 64},
    "heads of 128, teacher in fp32": {"teacher_dtype": SINGLE},
    "heads of 64": {"width": 64, "teacher_width": 64},
    "heads of 96": {"width": 96, "teacher_width": 96},
    "heads of 256": {"width": 256, "teacher_width": 256},
    "heads of 16": {"width": 16, "teacher_width": 16},
    "heads of 128, fp16": {"dtype": torch.float16, "teacher_dtype": torch.float16},
    "heads of 64, fp32": {
        "width": 64, "teacher_width": 64, "dtype": SINGLE, "teacher_dtype": SINGLE,
    },
    "heads of 128, fp32": {"dtype": SINGLE, "teacher_dtype": SINGLE},
    "heads of 128, fp32, teacher in bf16": {"dtype": SINGLE},
}  # fmt: skip
#: Every other tile size that a sweep tries.
for width in (64, 128, 256):
    for tiles in candidates(Shape(width, width, HALF, HALF), torch.device("cpu"))[1:]:
        named = ",".join(str(part) for part in astuple(tiles))
        ATTENTION[f"heads of {width}, tiles {named}"] = {
            "width": width, "teacher_width": width, "tiles": named,
        }  # fmt: skip
EVERYTHING = {"teacher_size": 32064, "temperature": 2.0, "student_cap": 30.0, "target_cap": 30.0}
VOCABULARY = {
    "prediction": {"labels": False, "metrics": False},
    "prediction, labels, metrics": {},
    "labels": {"target": False},
    "labels, dft": {"target": False, "label_kind": "dft"},
    "prediction, vocabulary of 151,936": {"size": 151936, "teacher_size": 151936},
    "prediction, odd vocabulary": {"size": 32001, "teacher_size": 32001},
    "no gradient": {"gradient": False},
    **{f"{kind}, everything": {"kind": kind, **EVERYTHING} for kind in KINDS},
}


class Hopper:
    """Answers for a GPU that is not there."""

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device=None):
        return 0

    def get_active_torch_device(self):
        return torch.device("cpu")


def launches():
    """A list to which every launch from now on adds (name of the kernel, what was compiled)."""
    driver.set_active(Hopper())
    found, run = [], JITFunction.run

    def compiled_only(self, *arguments, grid, warmup=False, **options):
        kernel = run(self, *arguments, grid=grid, warmup=True, **options)
        found.append((self.fn.__name__, kernel))
        return kernel

    JITFunction.run = compiled_only
    return found


def attention_layer(
    *, length=2048, width=128, teacher_width=128, teacher_heads=32, dtype=HALF, teacher_dtype=HALF,
    segments=None, window=None, tiles="default",
):  # fmt: skip
    """Value and gradients of a layer of 32 heads over 8 key heads."""
    os.environ[VARIABLE] = tiles

    def drawn(heads, size, kind):
        return torch.empty(1, length, heads, size, dtype=kind).transpose(1, 2)

    student, teacher = (
        Projections(drawn(heads, size, kind), drawn(8, size, kind), size**-0.5)
        for heads, size, kind in (
            (32, width, dtype), (teacher_heads, teacher_width, teacher_dtype),
        )
    )  # fmt: skip
    ids = {
        None: None,
        "packed": (torch.arange(length) // (length // 4))[None],
        "broken": (torch.arange(length) % 3)[None],
    }[segments]
    visible = Visibility(torch.ones(1, length), ids, window)
    attention.value(student, teacher, visible)
    attention.gradients(student, teacher, visible, torch.ones(()))


def vocabulary_tile(
    *, kind="forward_kl", size=32000, teacher_size=32000, target=True, labels=True, metrics=True,
    gradient=True, temperature=1.0, student_cap=None, target_cap=None,
    label_kind="cross_entropy",
):  # fmt: skip
    """A tile of logits scored."""
    weights = torch.ones(16)
    tile = Tile(
        student=torch.zeros(16, size),
        slope=torch.zeros(16, size, dtype=HALF),
        target=Weighted(torch.zeros(16, teacher_size), weights) if target else None,
        labels=Weighted(torch.zeros(16, dtype=torch.int64), weights) if labels else None,
        scores=PerToken(
            *(
                torch.zeros(16) if wanted else None
                for wanted in (
                    target,
                    labels,
                    metrics and target,
                    metrics and target,
                    label_kind == "dft",
                )
            )
        ),
    )
    terms = Terms(kind, 0.5, temperature, student_cap, target_cap, gradient, metrics, label_kind)
    vocabulary.score(tile, terms)


def usage(kernel):
    """Registers and bytes on the stack of a thread, as ptxas assigned them."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        told = subprocess.run(
            [tool, "-res-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    numbers = dict(re.findall(r"(REG|STACK):(\d+)", told))
    return int(numbers["REG"]), int(numbers["STACK"])


def rows(cases):
    """What every kernel of the cases takes."""
    found = launches()
    for case in cases:
        if case in ATTENTION:
            attention_layer(**ATTENTION[case])
        else:
            vocabulary_tile(**VOCABULARY[case])
        for name, kernel in found:
            registers, stack = usage(kernel)
            yield {
                "case": case,
                "kernel": name,
                "registers": registers,
                "spilled_bytes": stack,
                "shared_bytes": kernel.metadata.shared,
                "warps": kernel.metadata.num_warps,
                "stages": kernel.metadata.num_stages,
                "wgmma": len(re.findall(r"wgmma\.mma_async", kernel.asm["ptx"])),
            }
        found.clear()


def main(arguments):
    as_table = "--table" in arguments
    cases = [each for each in arguments if each != "--table"] or [*ATTENTION, *VOCABULARY]
    for number, row in enumerate(rows(cases)):
        if as_table and number == 0:
            print("| " + " | ".join(row) + " |\n" + "|" + "---|" * len(row))
        line = "| " + " | ".join(map(str, row.values())) + " |" if as_table else json.dumps(row)
        print(line, flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
