"""Memory and time of DAE over one base, beside a student with two whole teachers.

A Llama of random weights; student, reference and expert are adapters over it. `one base` holds its
weights once and switches adapters; `three models` loads reference and expert as models of their
own. Same batches, same adapters. Each way is a process of its own; memory is what is resident (or
allocated, on a GPU) after loading and at the peak of the steps, above the imports.

    python benchmarks/adapters.py [--quick] [--json]

``--quick`` ends within 50 seconds on two cores; a full run also writes a dated table to
``benchmarks/results``.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

import _results
import torch
from _memory import peak_above, settled
from _results import DEVICE

if TYPE_CHECKING:
    from collections.abc import Iterator

MEBIBYTE = 2**20
WAYS = ("three models", "one base")


def make(folder: Path, size: dict[str, int]) -> None:
    """The base, and an expert's adapter over it."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from dominie.models.loading import load_student
    from dominie.models.spec import Model
    from dominie.training.settings import Lora

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=size["vocabulary"],
        hidden_size=size["width"],
        intermediate_size=3 * size["width"],
        num_hidden_layers=size["layers"],
        num_attention_heads=size["width"] // 64,
        num_key_value_heads=size["width"] // 64,
        dtype="float32",
    )
    LlamaForCausalLM(config).save_pretrained(folder / "base")
    expert = load_student(Model(path=str(folder / "base")), lora=Lora(merge=False))
    for name, parameter in expert.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.01)
    expert.save_pretrained(folder / "expert")


def measured(way: str, folder: Path, size: dict[str, int]) -> dict[str, object]:
    """Loading and stepping in one of the two ways."""
    from dominie.data.batch import collate
    from dominie.data.row_store import Row
    from dominie.losses.objective import Objective
    from dominie.losses.terms import LossTerms, Prediction
    from dominie.models.loading import load_frozen, load_student
    from dominie.models.spec import Model
    from dominie.teachers import AdapterTeacher, LocalTeacher, RoutedTeacher
    from dominie.training.loss_forward import DistillationInputs, loss_in_forward
    from dominie.training.settings import Lora

    torch.manual_seed(2)
    before = settled()
    base, expert = Model(path=str(folder / "base")), Model(path=str(folder / "expert"))
    student = load_student(base, lora=Lora()).to(DEVICE)
    if way == "one base":
        adapters = {"reference": None, "expert": expert.path}
        teachers: dict[str, LocalTeacher] = {
            name: AdapterTeacher(student, adapter) for name, adapter in adapters.items()
        }
    else:
        specs = {"reference": base, "expert": expert}
        teachers = {n: LocalTeacher(load_frozen(s, device=DEVICE)) for n, s in specs.items()}
    models = [student, *(teacher.model for teacher in teachers.values())]
    weights = {p.data_ptr(): p.numel() * p.element_size() for m in models for p in m.parameters()}
    router = RoutedTeacher(teachers, ["reference", "expert"])
    trained = [p for p in student.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(trained, lr=1e-4)
    objective = Objective([LossTerms(prediction=Prediction())] * 2)
    shape = (size["rows"], size["length"])
    generator = torch.Generator().manual_seed(1)
    seconds, losses = [], []
    with loss_in_forward(student, objective):
        for _ in range(size["steps"]):
            ids = torch.randint(0, size["vocabulary"], shape, generator=generator)
            rows = [Row(tokens, [True] * len(tokens)) for tokens in ids.tolist()]
            batch = collate([(i % 2, row) for i, row in enumerate(rows)]).to(DEVICE)
            _wait()
            began = time.perf_counter()
            outputs = student(
                inputs=DistillationInputs(batch, router.signal(batch), measured=False)
            )
            (outputs["loss"] / ids.numel()).backward()
            optimiser.step()
            optimiser.zero_grad()
            _wait()
            seconds.append(time.perf_counter() - began)
            losses.append(float(outputs["loss"]) / ids.numel())
    return {
        "way": way,
        "weights_mb": sum(weights.values()) // MEBIBYTE,
        "peak_mb": (peak_above(before) or 0) // MEBIBYTE,
        "step_s": round(min(seconds[1:]), 3),
        "first_loss": round(losses[0], 6),
    }


def _wait() -> None:
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


def rows(size: dict[str, int]) -> Iterator[_results.Row]:
    """Both ways, each in a process of its own."""
    with tempfile.TemporaryDirectory() as made:
        make(Path(made), size)
        for way in WAYS:
            command = [sys.executable, __file__, "--one", way, made, json.dumps(size)]
            said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            yield json.loads(said.splitlines()[-1])


def main() -> None:
    parser = _results.parser(__doc__)
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        way, folder, size = options.one
        print(json.dumps(measured(way, Path(folder), json.loads(size))))
        return
    size = {"vocabulary": 32_000, "width": 768, "layers": 8, "rows": 4, "length": 128, "steps": 4}
    if options.quick:
        size |= {"vocabulary": 8_000, "width": 512, "layers": 6, "length": 128, "steps": 3}
    parts = _results.gathered(rows(size), as_json=options.json)
    told = ", ".join(f"{key} {value}" for key, value in size.items())
    _results.finish(
        "adapters", "One base or three models", parts, options, note=f"float32: {told}."
    )


if __name__ == "__main__":
    main()
