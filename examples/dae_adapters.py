"""Domain Alignment from Expert under your own Trainer: three models over one base.

The student is a LoRA adapter; the reference is the bare base; the expert is another adapter that
has been tuned on the domain. The weights are loaded once. Every row is sent to the teacher of its
source before any forward pass: domain rows to the expert, all others to the reference.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch.utils.data import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

from dominie.data.batch import Batch, collate
from dominie.data.sources import Source, read_split
from dominie.data.tokenization import Encoded, encode_all
from dominie.losses.objective import Objective
from dominie.losses.terms import LossTerms, NextToken, Prediction
from dominie.teachers import AdapterTeacher, RoutedTeacher, Teacher
from dominie.toyworld import materialise
from dominie.training.loss_forward import DistillationInputs, loss_in_forward

SOURCES = ("domain", "general")  # a row carries the index of its source
FOLLOW = LossTerms(prediction=Prediction())
IMITATE = LossTerms(next_token=NextToken())


class Rows(Dataset[tuple[int, Encoded]]):
    """Tokenised conversations, each with the index of its source."""

    def __init__(self, rows: list[tuple[int, Encoded]]) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[int, Encoded]:
        return self.rows[index]


class TaughtTrainer(Trainer):
    """An ordinary Trainer whose loss is what dominie's objective makes of the teachers' words."""

    teacher: Teacher | None = None

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **_: Any) -> Any:
        """The mean loss of a batch over its supervised tokens."""
        batch = Batch.from_dict(inputs)
        signal = self.teacher.signal(batch) if self.teacher else None
        outputs = model(inputs=DistillationInputs(batch, signal))
        loss = outputs["loss"] / batch.supervised.sum()
        return (loss, outputs) if return_outputs else loss


def train(
    model: Any, rows: Rows, terms: list[LossTerms], teacher: Teacher | None, out: Path, steps: int
) -> None:
    """Train the adapter that is switched on."""
    arguments = TrainingArguments(
        output_dir=str(out),
        max_steps=steps,
        per_device_train_batch_size=16,
        learning_rate=5e-3,
        report_to="none",
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
        remove_unused_columns=False,
        use_cpu=True,
        seed=0,
    )
    with loss_in_forward(model, Objective(terms)):
        trainer = TaughtTrainer(
            model,
            arguments,
            train_dataset=rows,
            data_collator=lambda pairs: collate(pairs).as_dict(),
        )
        trainer.teacher = teacher
        trainer.train()


def measured(model: Any, rows: Rows, teacher: Teacher) -> dict[str, float]:
    """KL to the teacher of each source, in nats per token."""
    batch = collate(rows.rows)
    model.eval()
    objective = Objective([FOLLOW, FOLLOW])
    with loss_in_forward(model, objective), torch.no_grad():
        sums = model(inputs=DistillationInputs(batch, teacher.signal(batch)))["by_source"]
    sums_of = dict(zip(objective.columns, sums.T, strict=True))
    kl = sums_of["divergence"] / sums_of["tokens"]
    return dict(zip(SOURCES, kl.tolist(), strict=True))


def align(folder: Path, steps: int = 60) -> tuple[dict[str, float], dict[str, float]]:
    """Tune an expert on the domain, then align a student from both.

    Returns:
        KL of the student to each source's teacher, before and after.
    """
    torch.manual_seed(0)
    base = materialise("toyworld:student", folder)
    tokenizer = AutoTokenizer.from_pretrained(base)
    pairs: list[tuple[int, Encoded]] = []
    for index, name in enumerate(SOURCES):
        path = str(materialise(f"toyworld:{name}?rows=48", folder))
        chats = read_split(Source(name=name, path=path), "train")
        pairs += [(index, row) for row in encode_all(tokenizer, chats)]
    rows = Rows(pairs)
    lora = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")

    expert = get_peft_model(AutoModelForCausalLM.from_pretrained(base), lora)
    domain = Rows([(index, row) for index, row in pairs if SOURCES[index] == "domain"])
    train(expert, domain, [IMITATE, IMITATE], None, folder / "out", steps)
    expert.save_pretrained(folder / "expert")

    student = get_peft_model(AutoModelForCausalLM.from_pretrained(base), lora)
    teacher = RoutedTeacher(
        {
            "expert": AdapterTeacher(student, str(folder / "expert")),
            "reference": AdapterTeacher(student, None),
        },
        routes=["expert", "reference"],
    )
    before = measured(student, rows, teacher)
    train(student, rows, [FOLLOW, FOLLOW], teacher, folder / "out", steps)
    return before, measured(student, rows, teacher)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        before, after = align(Path(scratch))
    for source in SOURCES:
        print(f"{source}: KL to its teacher {before[source]:.4f} before, {after[source]:.4f} after")
