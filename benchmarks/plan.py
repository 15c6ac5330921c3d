"""The planner's peak memory beside that of training, measured.

Each case is a recipe over models with random weights. A process of its own imports what it needs,
notes its memory, runs the recipe's stage through the ordinary trainer for two steps, and tells its
peak above that (on a GPU the allocator's own count). The plan sees the recipe alone.

    python benchmarks/plan.py [--quick] [--json] [--case NAME] [--no-file]

``--quick`` ends within 50 seconds on two cores and measures one case; a full run also writes a
dated table to ``benchmarks/results``.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import _results
import torch
from _memory import resident

if TYPE_CHECKING:
    from collections.abc import Iterator

_SHARED = {"num_attention_heads": 8, "num_key_value_heads": 4, "max_position_embeddings": 2048}
_PREDICTION = {"prediction": 1.0}


@dataclass(frozen=True)
class Case:
    """A stage: its models' sizes, its settings, its loss."""

    student: dict[str, Any]
    train: dict[str, Any]
    loss: dict[str, float]
    teacher: dict[str, Any] = field(default_factory=dict)

    def write(self, folder: Path) -> Path:
        """Models, data and the recipe over them."""
        from transformers import AutoModelForCausalLM, MistralConfig, MixtralConfig

        from dominie.toyworld.toy_models import word_tokenizer

        tokenizer = word_tokenizer()
        for name in ("student", "teacher"):
            if not (sizes := getattr(self, name)):
                continue
            kind = MixtralConfig if "num_local_experts" in sizes else MistralConfig
            config = kind(**_SHARED, **sizes, sliding_window=None, pad_token_id=0)
            torch.manual_seed(0)
            AutoModelForCausalLM.from_config(config).save_pretrained(folder / name)
            tokenizer.save_pretrained(folder / name)
        answer = " ".join(["red"] * self.train["max_length"])  # every row is as long as may be
        turns = [{"role": "assistant", "content": answer}]
        rows = [{"messages": [{"role": "user", "content": f"copy {i}"}, *turns]} for i in range(32)]
        (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        stage = {"student": str(folder / "student"), "data": {"all": 1.0}, "loss": self.loss}
        if self.teacher:
            stage["teacher"] = str(folder / "teacher")
        recipe = {
            "name": "planned",
            "data": {"all": "data.jsonl"},
            "train": {"steps": 2, **self.train},
            "stages": {"s": stage},
        }
        path = folder / "recipe.yaml"
        path.write_text(json.dumps(recipe))
        return path


CASES = {
    "KD with attention, full, fp32": Case(
        student={
            "hidden_size": 256,
            "num_hidden_layers": 16,
            "intermediate_size": 768,
            "vocab_size": 16000,
        },
        teacher={
            "hidden_size": 256,
            "num_hidden_layers": 16,
            "intermediate_size": 512,
            "vocab_size": 16000,
            "num_local_experts": 4,
        },
        train={"max_length": 512, "batch": 6, "micro_batch": 6},
        loss={"prediction": 1.0, "attention": 1.0},
    ),
    "LoRA, fp32": Case(
        student={
            "hidden_size": 512,
            "num_hidden_layers": 12,
            "intermediate_size": 1536,
            "vocab_size": 16000,
        },
        train={"max_length": 512, "batch": 6, "micro_batch": 3, "lora": {"r": 16}},
        loss={"next_token": 1.0},
    ),
    "checkpointing, large vocabulary": Case(
        student={
            "hidden_size": 512,
            "num_hidden_layers": 4,
            "intermediate_size": 1536,
            "vocab_size": 64000,
        },
        teacher={
            "hidden_size": 256,
            "num_hidden_layers": 2,
            "intermediate_size": 512,
            "vocab_size": 64000,
        },
        train={
            "max_length": 256,
            "batch": 4,
            "micro_batch": 2,
            "gradient_checkpointing": True,
            "packing": False,
        },
        loss=_PREDICTION,
    ),
}
#: glibc returns freed tensors to the system, as `GiveBackFreedMemory` has it do between steps.
_ENVIRONMENT = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "262144"}
QUICK = "checkpointing, large vocabulary"


def measured(name: str) -> _results.Row:
    """Planned and measured peak of a case in GB, and by how much they differ."""
    from dominie.planning.plan import machine, plan_recipe
    from dominie.recipe import load_recipe

    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        recipe = CASES[name].write(folder)
        stage = plan_recipe(load_recipe(recipe), machine()).stages["s"]
        command = [sys.executable, __file__, "--train", str(recipe), str(folder / "runs")]
        started = time.perf_counter()
        said = subprocess.run(command, capture_output=True, text=True, check=True, env=_ENVIRONMENT)
        seconds = time.perf_counter() - started
    told = json.loads(said.stdout.splitlines()[-1])
    return {
        "case": name,
        "parameters": stage.shape.parameters,
        "planned_gb": round(stage.peak / 1e9, 3),
        "measured_gb": round(told["peak"] / 1e9, 3),
        "difference": f"{100 * (stage.peak / told['peak'] - 1):+.1f} %",
        "phase": stage.memory.peak_phase,
        "baseline_gb": round(told["baseline"] / 1e9, 3),
        "seconds": round(seconds, 1),
    }


def trained(recipe: Path, runs: Path) -> dict[str, int]:
    """Peak of this process above what it held after its imports, and that, in bytes."""
    import datasets  # noqa: F401
    import peft  # noqa: F401
    from rich.console import Console
    from transformers import MistralForCausalLM, MixtralForCausalLM, Trainer  # noqa: F401

    import dominie.training.train_stage  # noqa: F401
    from dominie.core.display import Display
    from dominie.recipe import load_recipe
    from dominie.stages.run_folder import RunFolder
    from dominie.stages.run_stages import run_stages

    baseline = resident("VmRSS") or 0
    folder = RunFolder(load_recipe(recipe), runs)
    with folder.locked():
        run_stages(folder, Display(Console(stderr=True)))
    if _results.GPU:
        return {"peak": torch.cuda.max_memory_allocated(), "baseline": 0}
    return {"peak": (resident("VmHWM") or 0) - baseline, "baseline": baseline}


def rows(names: list[str]) -> Iterator[_results.Row]:
    """A row for each case."""
    for name in names:
        yield measured(name)


def main() -> None:
    """Measure, compare, print."""
    parser = _results.parser(__doc__)
    parser.add_argument("--case", choices=CASES, help="one case")
    parser.add_argument("--no-file", action="store_true", help="leave benchmarks/results alone")
    parser.add_argument("--train", nargs=2, type=Path, help="(a case's own process)")
    options = parser.parse_args()
    if options.train:
        print(json.dumps(trained(*options.train)))
        return
    names = [options.case] if options.case else [QUICK] if options.quick else list(CASES)
    parts = _results.gathered(rows(names), as_json=options.json)
    note = (
        "Peak resident memory of a process above its imports while the ordinary trainer takes two\n"
        "steps, and what `dominie plan` says of the same recipe. GB are 10⁹ bytes."
    )
    options.quick |= options.no_file or options.case is not None
    _results.finish("plan", "Planned and measured memory", parts, options, note=note)


if __name__ == "__main__":
    main()
