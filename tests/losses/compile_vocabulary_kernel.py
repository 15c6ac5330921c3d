"""Compile every kind of the vocabulary kernel for an H100, which takes no GPU; print the kinds.

Run by test_vocabulary_kernel.py, in a process in which Triton does not interpret.
"""

from __future__ import annotations

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from dominie.losses.divergence import KINDS
from dominie.losses.kernels import vocabulary

INTEGERS = ("student_size", "target_size", "ignored")
NUMBERS = ("inverse_temperature", "student_cap", "target_cap", "beta")
FLAGS = ("TARGET", "LABELS", "METRICS", "GRADIENT", "TEMPERED", "STUDENT_CAPPED", "TARGET_CAPPED")


def type_of(name):
    if name.isupper():
        return "constexpr"
    if name in INTEGERS:
        return "i32"
    if name in NUMBERS:
        return "fp32"
    return "*i64" if name == "labels" else "*fp32"


for index, kind in enumerate(KINDS):
    kernel = vocabulary._score_token
    constants = dict.fromkeys(FLAGS, True) | {
        "KIND": index,
        "RESTRICTED": True,
        "WALKS": 1 if kind == "forward_kl" else 2,
        "BLOCK": vocabulary._BLOCK,
    }
    source = ASTSource(kernel, {name: type_of(name) for name in kernel.arg_names}, constants)
    options = {"num_warps": vocabulary._WARPS}
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    assert len(compiled.asm["cubin"]) > 0
    print(kind)
