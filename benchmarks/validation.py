"""What it costs to measure forgetting in validation: time of an evaluation with and without.

A Llama of random weights is evaluated on held-out rows: by their labels, and compared with a
teacher of its own size as in DAE. With `train.forgetting` every forward pass meets the head of the
base as well; the base itself runs once, as the stage begins. The ways take turns in one process;
times are medians.

    python benchmarks/validation.py [--quick] [--json]

``--quick`` ends within 50 seconds on two cores; a full run also writes a dated table to
``benchmarks/results``.
"""

from __future__ import annotations

import statistics
import time
from typing import TYPE_CHECKING

import _results
import torch
from _results import DEVICE

if TYPE_CHECKING:
    from collections.abc import Iterator

MEBIBYTE = 2**20


def rows(size: dict[str, int]) -> Iterator[_results.Row]:
    """An evaluation by labels and one beside a teacher, each with and without."""
    from accelerate import Accelerator
    from transformers import LlamaConfig, LlamaForCausalLM

    from dominie.data.row_store import Row
    from dominie.losses.objective import Objective
    from dominie.losses.terms import LossTerms, NextToken, Prediction
    from dominie.teachers import LocalTeacher, RoutedTeacher
    from dominie.training.dataloader import Collator
    from dominie.training.loss_forward import loss_in_forward
    from dominie.training.stage_sources import StageSource
    from dominie.training.validation import Validation

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=size["vocabulary"],
        hidden_size=size["width"],
        intermediate_size=3 * size["width"],
        num_hidden_layers=size["layers"],
        num_attention_heads=size["width"] // 64,
        num_key_value_heads=size["width"] // 64,
    )
    student, teacher = (LlamaForCausalLM(config).to(DEVICE) for _ in range(2))
    accelerator = Accelerator(cpu=DEVICE.type == "cpu")
    ids = torch.randint(0, size["vocabulary"], (size["rows"], size["length"])).tolist()
    held_out = [
        Row(each, [i >= size["length"] // 2 for i in range(size["length"])]) for each in ids
    ]
    router = RoutedTeacher({"teacher": LocalTeacher(teacher.eval())}, ["teacher"])
    for way, terms in (
        ("labels", LossTerms(next_token=NextToken())),
        ("a teacher", LossTerms(prediction=Prediction())),
    ):
        source = StageSource(name="rows", train=(), validation=held_out, share=1.0, terms=terms)
        objective = Objective([terms])
        off, on = (
            Validation(
                [source],
                objective,
                collator=Collator([0], size["length"]),
                teacher=router if way == "a teacher" else None,
                batch=8,
                forgetting=forgetting,
            )
            for forgetting in (False, True)
        )
        began = time.perf_counter()
        on.begin(student, accelerator)
        begin = time.perf_counter() - began
        seconds: dict[bool, list[float]] = {False: [], True: []}
        with loss_in_forward(student, objective):
            for turn in range(size["turns"] + 1):
                for measures, validation in ((False, off), (True, on)):
                    began = time.perf_counter()
                    found, _ = validation.measure(student, accelerator)
                    if turn:  # the first one warms up
                        seconds[measures].append(time.perf_counter() - began)
        assert found["rows"]["forgetting"] == 0.0, "it has not moved"
        without, with_it = (statistics.median(seconds[each]) for each in (False, True))
        assert on.base is not None
        yield {
            "compared with": way,
            "without_s": round(without, 3),
            "with_s": round(with_it, 3),
            "ratio": round(with_it / without, 2),
            "once_s": round(begin, 3),
            "kept_mb": round(on.base.bytes / MEBIBYTE, 1),
        }


def main() -> None:
    options = _results.parser(__doc__).parse_args()
    size = {"vocabulary": 32_000, "width": 512, "layers": 8, "rows": 64, "length": 128, "turns": 5}
    if options.quick:
        size |= {"vocabulary": 8_000, "layers": 4, "rows": 32, "turns": 3}
    parts = _results.gathered(rows(size), as_json=options.json)
    told = ", ".join(f"{key} {value}" for key, value in size.items())
    _results.finish(
        "validation", "Forgetting in validation", parts, options, note=f"float32: {told}."
    )


if __name__ == "__main__":
    main()
