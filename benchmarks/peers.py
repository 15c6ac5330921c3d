"""One epoch by dominie and by the libraries beside it: tokens a second, memory, time to begin.

Two jobs on the same conversations, models, batch, length and precision: distillation from a
teacher's predictions (forward KL over the whole vocabulary on the answers), and next-token tuning
on the answers. Each is run by `dominie run` and by TRL's `GKDTrainer` with λ = 0 and `SFTTrainer`,
as they are used: files in, a model out. DistillKit does the first job, on all tokens. Every run is
a process of its own with this interpreter; libraries take turns in every round. What is not there
is left out. A library may lie in a folder of its own: `pip install --target FOLDER --no-deps
trl==1.16.0`, and for DistillKit trl==0.25.1 with the package `distillkit` of its repository beside.

    python benchmarks/peers.py [--quick] [--json] [--path trl=FOLDER --path distillkit=FOLDER]
        [--student FOLDER --teacher FOLDER --data FILE]

Without a model the two are small Mistrals with random weights and 32,000 tokens, and the
conversations are of random words. Seconds before the first step begin with the process and end
where the first forward pass begins; tokens are all of the data, of prompts too, by the time from
there to the end of the last step. Memory is the process's peak, with its imports; on a GPU that of
the card. ``--quick`` ends within 50 seconds on two cores.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import _memory
import _results
import torch
from _results import GPU, Row

if TYPE_CHECKING:
    from collections.abc import Iterator

BATCH, LENGTH, RATE = 16, 512, 1e-5
JOBS = {
    "distillation": ("dominie", "trl", "distillkit"),
    "next token": ("dominie", "trl"),
}
TEMPLATE = (
    "{% for m in messages %}"
    "{% if m.role == 'assistant' %}"
    "{{ 'w3 ' }}{% generation %}{{ m.content + ' ' + eos_token }}{% endgeneration %}{{ ' ' }}"
    "{% else %}{{ 'w2 ' + m.content + ' ' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'w3 ' }}{% endif %}"
)


def make_inputs(folder: Path, quick: bool) -> tuple[str, str, str]:
    """Random models and conversations: the paths of student, teacher and data."""
    from generation import random_mistral
    from on_policy import tokenizer_of_all_ids

    shape = (128, 2) if quick else (2048, 16) if GPU else (256, 4)
    tokenizer = tokenizer_of_all_ids()
    tokenizer.chat_template = TEMPLATE
    for name in ("student", "teacher"):
        model = random_mistral(*shape)
        model.config.eos_token_id = model.generation_config.eos_token_id = tokenizer.eos_token_id
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    random = torch.Generator().manual_seed(0)

    def words(low: int, high: int) -> str:
        count = int(torch.randint(low, high, (1,), generator=random))
        return " ".join(f"w{i}" for i in torch.randint(4, 20_000, (count,), generator=random))

    rows = [
        {
            "messages": [
                {"role": "user", "content": words(20, 80)},
                {"role": "assistant", "content": words(20, 160)},
            ]
        }
        for _ in range(48 if quick else 1024 if GPU else 160)
    ]
    data = folder / "data.jsonl"
    data.write_text("\n".join(map(json.dumps, rows)) + "\n", encoding="utf-8")
    return str(folder / "student"), str(folder / "teacher"), str(data)


# A process of its own ------------------------------------------------------------------------


def by_dominie(job: str, student: str, teacher: str, data: str, out: Path) -> None:
    """`dominie run` of a recipe with one stage."""
    from dominie.api import run

    learnt = {"prediction": 1.0} if job == "distillation" else {"next_token": 1.0}
    stage: dict[str, Any] = {"student": student, "data": {"chats": 1.0}, "loss": learnt}
    if job == "distillation":
        stage["teacher"] = teacher
    train = {
        "learning_rate": RATE, "batch": BATCH, "micro_batch": BATCH, "epochs": 1,
        "max_length": LENGTH, "precision": "bf16" if GPU else "fp32",
    }  # fmt: skip
    recipe = {
        "name": "peer",
        "data": {"chats": {"path": data}},
        "train": train,
        "stages": {"tuned": stage},
    }
    with contextlib.redirect_stdout(sys.stderr):
        run(recipe, runs=out)


def by_trl(job: str, student: str, teacher: str, data: str, out: Path) -> None:
    """TRL's trainer for the job."""
    from datasets import load_dataset
    from transformers import AutoTokenizer

    common: dict[str, Any] = {
        "output_dir": str(out), "learning_rate": RATE, "num_train_epochs": 1,
        "per_device_train_batch_size": BATCH, "max_length": LENGTH, "bf16": GPU, "use_cpu": not GPU,
        "gradient_checkpointing": False, "save_strategy": "no", "report_to": [],
        "disable_tqdm": True,
    }  # fmt: skip
    rows = load_dataset("json", data_files=data, split="train")
    tokenizer = AutoTokenizer.from_pretrained(student)
    if job == "distillation":
        from trl.experimental.gkd import GKDConfig, GKDTrainer

        options = GKDConfig(**common, lmbda=0.0, beta=0.0, temperature=1.0)
        trainer = GKDTrainer(
            student, teacher, options, train_dataset=rows, processing_class=tokenizer
        )
    else:
        from trl import SFTConfig, SFTTrainer

        options = SFTConfig(**common, assistant_only_loss=True)
        trainer = SFTTrainer(student, options, train_dataset=rows, processing_class=tokenizer)
    with contextlib.redirect_stdout(sys.stderr):
        trainer.train()
        trainer.save_model(str(out / "model"))


def by_distillkit(job: str, student: str, teacher: str, data: str, out: Path) -> None:
    """DistillKit's own entry, from a data set on disk."""
    from datasets import load_dataset
    from distillkit.configuration import DistillationRunConfig
    from distillkit.main import do_distill

    assert job == "distillation"
    load_dataset("json", data_files=data, split="train").save_to_disk(str(out / "rows"))
    config = {
        "model": student,
        "teacher": {"kind": "hf", "path": teacher},
        "dataset": {"train_dataset": {"disk_path": str(out / "rows")}},
        "sequence_length": LENGTH,
        "output_path": str(out / "model"),
        "use_flash_attention": False,
        "loss_functions": [
            {
                "function": "kl",
                "weight": 1.0,
                "temperature": 1.0,
                "missing_probability_handling": "zero",
            }
        ],
        "training_args": {
            "learning_rate": RATE, "num_train_epochs": 1, "per_device_train_batch_size": BATCH,
            "bf16": GPU, "use_cpu": not GPU, "gradient_checkpointing": False,
            "save_strategy": "no", "report_to": [], "disable_tqdm": True,
        },
    }  # fmt: skip
    with contextlib.redirect_stdout(sys.stderr):
        do_distill(DistillationRunConfig.model_validate(config))


def alone(arguments: list[str]) -> None:
    """One run in this process; prints one object: when steps began and ended, and the peak."""
    by, job, student, teacher, data, out, started = arguments
    from transformers import Trainer

    marks: list[float] = []
    step = Trainer.training_step

    def marked(*args: Any, **options: Any) -> Any:
        if not marks:
            marks.extend([time.time()] * 2)
        found = step(*args, **options)
        if GPU:
            torch.cuda.synchronize()
        marks[1] = time.time()
        return found

    Trainer.training_step = marked
    runs = {"dominie": by_dominie, "trl": by_trl, "distillkit": by_distillkit}
    runs[by](job, student, teacher, data, Path(out))
    peak = torch.cuda.max_memory_allocated() if GPU else _memory.resident("VmHWM")
    found = {"before": marks[0] - float(started), "steps": marks[1] - marks[0], "peak": peak}
    print(json.dumps(found | {"trl": None if by == "dominie" else version("trl")}))


# All of them ---------------------------------------------------------------------------------


def measured(by: str, job: str, paths: tuple[str, str, str], folder: str | None) -> dict[str, Any]:
    """Figures of one run in a process of its own, for which a library may lie in a folder.

    Raises:
        RuntimeError: it failed.
    """
    with tempfile.TemporaryDirectory() as out:
        command = [sys.executable, __file__, "--alone", by, job, *paths, out, str(time.time())]
        search = [*([folder] if folder else []), os.environ.get("PYTHONPATH", "")]
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": os.pathsep.join(search)}
        done = subprocess.run(
            command, capture_output=True, text=True, env=environment, check=False, cwd=out
        )
    if done.returncode:
        raise RuntimeError(f"{by}, {job}: {done.stderr.strip()[-600:]}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def tokens_of(data: str, student: str) -> int:
    """All tokens of the conversations."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(student)
    rows = [json.loads(line)["messages"] for line in Path(data).read_text("utf-8").splitlines()]
    texts = [tokenizer.apply_chat_template(row, tokenize=False) for row in rows]
    return sum(len(tokenizer(text, add_special_tokens=False).input_ids) for text in texts)


def rows(options: argparse.Namespace) -> Iterator[Row]:
    """A row for each job and library."""
    with tempfile.TemporaryDirectory() as scratch:
        paths = (options.student, options.teacher or options.student, options.data)
        if options.student is None:
            paths = make_inputs(Path(scratch), options.quick)
        tokens = tokens_of(paths[2], paths[0])
        folders = dict(each.split("=", 1) for each in options.path)
        for job, libraries in JOBS.items():
            there = [name for name in libraries if name in folders or _results.there(name)]
            found: dict[str, list[dict[str, Any]]] = {name: [] for name in there}
            for _ in range(1 if options.quick else options.rounds):
                for name in there:
                    found[name].append(measured(name, job, paths, folders.get(name)))
            for name in there:

                def median(key: str, of: list[dict[str, Any]] = found[name]) -> float:
                    return statistics.median(each[key] for each in of)

                yield {
                    "part": job,
                    "by": name,
                    "trl": found[name][0]["trl"],
                    "tokens_per_second": round(tokens / median("steps")),
                    "peak_mb": round(median("peak") / 1e6),
                    "seconds_before": round(median("before"), 1),
                }


def main() -> None:
    """Measure, print, and after a full run write down."""
    if sys.argv[1:2] == ["--alone"]:
        alone(sys.argv[2:])
        return
    parser = _results.parser(__doc__)
    parser.add_argument("--student", help="folder of a chat model, for both where no teacher is")
    parser.add_argument("--teacher", help="folder of a model with the same tokens")
    parser.add_argument("--data", help="JSON Lines with `messages`")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--path", action="append", default=[], help="LIBRARY=FOLDER")
    options = parser.parse_args()
    if (options.student is None) != (options.data is None):
        parser.error("--student and --data go together")
    found = _results.gathered(rows(options), as_json=options.json)
    note = (
        f"One epoch, batches of {BATCH}, {'bf16' if GPU else 'fp32'}; `seconds_before` the first "
        f"forward pass; {options.rounds} round(s), medians."
    )
    _results.finish("peers", "One epoch beside other libraries", found, options, note=note)


if __name__ == "__main__":
    main()
