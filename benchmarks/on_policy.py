"""An on-policy optimiser step by its parts, and as a whole beside TRL's.

A student answers prompts, a teacher of the same shape marks the answers over the whole vocabulary,
and the student takes a step on them, as in a stage with `on_policy: 1`. Generation is run for all
prompts at once, as a stage does, and one prompt at a time; both take turns in every round, so that
a busy machine is busy for both. Seconds are medians of the rounds, ratios medians of the ratios of
the rounds. The models are small Mistrals with random weights, which never end an answer; on a GPU
they have the shape of a 1B model, in bfloat16.

Where `trl` can be imported (a folder on PYTHONPATH made by `pip install --target FOLDER --no-deps
trl==1.16.0` will do), the whole step stands beside that of its `DistillationTrainer`: the same
models from the same folders, prompts, length of answers, divergence and precision, both through
their own training loop, a few steps each in turns. Memory is the process's peak above what was
there before the models were loaded, up to the end of the last step.

    python benchmarks/on_policy.py [--quick] [--json]

``--quick`` ends within 50 seconds on two cores; a full run also writes a dated table to
``benchmarks/results``.
"""

from __future__ import annotations

import contextlib
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import _memory
import _results
import torch
from _results import DEVICE, GPU, Row
from generation import VOCABULARY, random_mistral
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast, TrainerCallback

from dominie.data.batch import collate
from dominie.data.row_store import Row as Tokenised
from dominie.losses.objective import Objective
from dominie.losses.terms import LossTerms, Prediction
from dominie.models.spec import Model
from dominie.teachers import LocalTeacher
from dominie.toyworld.toy_models import word_tokenizer
from dominie.training.loss_forward import DistillationInputs, loss_in_forward
from dominie.training.rollouts import RolloutKey, RolloutSettings
from dominie.training.settings import TrainSettings
from dominie.training.stage_sources import StageSource, StageTraining
from dominie.training.student_answers import AskedAnswer, StudentAnswers
from dominie.training.train_stage import StageModels, train_stage

if TYPE_CHECKING:
    from collections.abc import Iterator


def timed(run: Callable[[], Any]) -> tuple[float, Any]:
    """Wall seconds of a call, and what it returns."""
    if GPU:
        torch.cuda.synchronize()
    began = time.perf_counter()
    result = run()
    if GPU:
        torch.cuda.synchronize()
    return time.perf_counter() - began, result


class Step:
    """The parts of an on-policy step, each of which can be timed alone."""

    def __init__(self, shape: tuple[int, int], prompts: int, new: int) -> None:
        self.student = random_mistral(*shape).train()
        self.teacher = LocalTeacher(random_mistral(*shape).requires_grad_(False))
        self.objective = Objective([LossTerms(prediction=Prediction(kind="reverse_kl"))])
        self.optimiser = torch.optim.AdamW(self.student.parameters(), lr=1e-6)
        random = torch.Generator().manual_seed(1)
        lengths = torch.randint(20, 120, (prompts,), generator=random).tolist()
        self.asked = [
            AskedAnswer(
                RolloutKey(1, "prompts", i),
                torch.randint(4, 200, (length,), generator=random).tolist(),
                new,
            )
            for i, length in enumerate(lengths)
        ]

    def answers(self, batch: int) -> list[Any]:
        """The student's answers, so many in a forward pass."""
        settings = RolloutSettings(batch=batch)
        writer = StudentAnswers(self.student, word_tokenizer(), ends=(), settings=settings, seed=0)
        return writer.write(self.asked)

    def learn(self, batch: Any, signal: Any) -> None:
        """Forward and backward pass of the student, and the optimiser."""
        outputs = self.student(inputs=DistillationInputs(batch, signal, measured=False))
        (outputs["loss"] / batch.positions.numel()).backward()
        self.optimiser.step()
        self.optimiser.zero_grad()


def sizes(quick: bool) -> tuple[tuple[int, int], int, int, int]:
    """Shape of the models, prompts of a step, tokens of an answer, rounds."""
    shape = (256, 4) if quick else (2048, 16) if GPU else (512, 8)
    return (shape, 16, 16, 2) if quick else (shape, 64 if GPU else 16, 64, 2)


def parts(quick: bool) -> Iterator[Row]:
    """One row for each part of a step."""
    shape, prompts, new, rounds = sizes(quick)
    step = Step(shape, prompts, new)
    times: dict[str, list[float]] = {}

    def keep(part: str, seconds: float) -> None:
        times.setdefault(part, []).append(seconds)

    with loss_in_forward(step.student, step.objective):
        for number in range(rounds + 1):
            taken: dict[str, float] = {}
            taken["generation"], answers = timed(lambda: step.answers(prompts))
            batch = collate([(0, answer.as_row()) for answer in answers]).to(DEVICE)
            taken["teacher"], signal = timed(lambda b=batch: step.teacher.signal(b))
            taken["student"], _ = timed(lambda b=batch, s=signal: step.learn(b, s))
            if number == 0:
                continue  # to warm up
            taken["generation, one prompt at a time"], _ = timed(lambda: step.answers(1))
            for part, seconds in taken.items():
                keep(part, seconds)
    whole = [sum(times[part][i] for part in list(times)[:3]) for i in range(rounds)]
    for part, seconds in times.items():
        ratios = [one / batched for one, batched in zip(seconds, times["generation"], strict=True)]
        yield {
            "part": "parts",
            "of": part,
            "prompts": prompts,
            "new_tokens": new,
            "seconds": round(statistics.median(seconds), 3),
            "share_of_step": round(
                statistics.median(s / all_of for s, all_of in zip(seconds, whole, strict=True)), 3
            ),
            "times_generation": round(statistics.median(ratios), 2),
        }


# Whole steps --------------------------------------------------------------------------------


class StepTimes(TrainerCallback):
    """Seconds of each step, with what goes before it, and the peak of memory until its end."""

    def __init__(self, before: int) -> None:
        self.before, self.peak = before, 0
        self.ends: list[float] = []

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        """The loop begins."""
        self._note()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """A step has ended."""
        self._note()

    def _note(self) -> None:
        if GPU:
            torch.cuda.synchronize()
        self.peak = _memory.peak_above(self.before) or 0
        self.ends.append(time.perf_counter())

    @property
    def seconds(self) -> list[float]:
        """Of each step but the first, which warms up."""
        return [end - start for start, end in zip(self.ends[1:], self.ends[2:], strict=False)]


def tokenizer_of_all_ids() -> PreTrainedTokenizerFast:
    """A word for each id of the models, so that each of them may be drawn."""
    words = {f"w{i}": i for i in range(VOCABULARY)}
    core = Tokenizer(WordLevel(words, unk_token="w1"))
    core.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="w0",
        eos_token=f"w{VOCABULARY - 1}",
        padding_side="left",
        chat_template=(
            "{% for m in messages %}{{ 'w2 ' + m.content + ' ' + eos_token + ' ' }}{% endfor %}"
            "{% if add_generation_prompt %}{{ 'w2 ' }}{% endif %}"
        ),
    )


class Whole:
    """Training loops on the same prompts, of dominie and of TRL.

    Args:
        folder: has the models `student` and `teacher`; what is trained is written into it.
        prompts: the tokens of each.
        new: tokens of an answer.
        steps: of a loop, the first of which warms up.
    """

    def __init__(self, folder: Path, prompts: list[list[int]], new: int, steps: int) -> None:
        self.folder, self.prompts, self.new, self.steps = folder, prompts, new, steps
        self.tokenizer = tokenizer_of_all_ids()

    def dominie(self, micro_batch: int, *, recompute: bool) -> StepTimes:
        """A stage with `on_policy: 1`."""
        source = StageSource(
            name="prompts",
            train=[Tokenised(prompt, [False] * len(prompt)) for prompt in self.prompts],
            validation=(),
            share=1.0,
            terms=LossTerms(prediction=Prediction(kind="reverse_kl")),
            teacher="teacher",
            on_policy=1.0,
        )
        settings = TrainSettings(
            learning_rate=1e-6,
            steps=self.steps,
            batch=len(self.prompts),
            micro_batch=micro_batch,
            max_length=512,
            precision="bf16" if GPU else "fp32",
            gradient_checkpointing=recompute,
            arguments={"use_cpu": not GPU},
        )
        with tempfile.TemporaryDirectory(dir=self.folder) as here:
            times = StepTimes(_memory.settled())
            train_stage(
                StageTraining(
                    folder=Path(here),
                    sources=[source],
                    settings=settings,
                    rollouts=RolloutSettings(max_new_tokens=self.new),
                ),
                StageModels(
                    student=Model(path=str(self.folder / "student")),
                    tokenizer=self.tokenizer,
                    teachers={"teacher": Model(path=str(self.folder / "teacher"))},
                ),
                callbacks=[times],
            )
        return times

    def trl(self, micro_batch: int, *, recompute: bool) -> StepTimes:
        """`DistillationTrainer` of TRL; its student is in fp32, as dominie's is."""
        from datasets import Dataset
        from trl import DistillationConfig, DistillationTrainer

        texts = [" ".join(f"w{i}" for i in prompt) for prompt in self.prompts]
        with tempfile.TemporaryDirectory(dir=self.folder) as here:
            times = StepTimes(_memory.settled())
            trainer = DistillationTrainer(
                str(self.folder / "student"),
                str(self.folder / "teacher"),
                DistillationConfig(
                    here,
                    learning_rate=1e-6,
                    max_steps=self.steps,
                    per_device_train_batch_size=micro_batch,
                    gradient_accumulation_steps=len(self.prompts) // micro_batch,
                    max_completion_length=self.new,
                    beta=1.0,
                    bf16=GPU,
                    use_cpu=not GPU,
                    gradient_checkpointing=recompute,
                    save_strategy="no",
                    report_to=[],
                    disable_tqdm=True,
                ),
                Dataset.from_dict({"prompt": texts}),
                processing_class=self.tokenizer,
                callbacks=[times],
            )
            with contextlib.redirect_stdout(None):  # a line of metrics
                trainer.train()
            del trainer
        return times


def whole_steps(quick: bool) -> Iterator[Row]:
    """Rows of dominie and TRL, with and without recomputed activations."""
    if not _results.there("trl"):
        return
    shape, prompts, new, rounds = sizes(quick)
    shape = shape if GPU else (256, 4)
    # Micro-batch, whether activations are recomputed (TRL's own default), rounds, and their steps.
    plans = [(prompts, False, 1, 2)] if quick else [(prompts, False, rounds, 3)]
    plans += [] if quick else [(prompts // 4, True, 1, 3)]
    random = torch.Generator().manual_seed(1)
    lengths = torch.randint(20, 120, (prompts,), generator=random).tolist()
    asked = [torch.randint(4, 20_000, (n,), generator=random).tolist() for n in lengths]
    _memory.prepare()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        for name in ("student", "teacher"):
            random_mistral(*shape).save_pretrained(folder / name)
        for micro_batch, recompute, rounds, steps in plans:
            whole = Whole(folder, asked, new, steps)
            times: dict[str, list[StepTimes]] = {"dominie": [], "trl": []}
            for _ in range(rounds):
                times["dominie"].append(whole.dominie(micro_batch, recompute=recompute))
                times["trl"].append(whole.trl(micro_batch, recompute=recompute))
            medians = {
                name: [statistics.median(each.seconds) for each in found]
                for name, found in times.items()
            }
            peaks = {name: max(each.peak for each in found) for name, found in times.items()}
            for name, seconds in medians.items():
                ratios = [a / b for a, b in zip(seconds, medians["trl"], strict=True)]
                yield {
                    "part": "a whole step",
                    "by": name if name == "dominie" else f"TRL {_results.version('trl')}",
                    "micro_batch": micro_batch,
                    "recomputed": "yes" if recompute else "no",
                    "seconds": round(statistics.median(seconds), 2),
                    "times_trl": round(statistics.median(ratios), 2),
                    "peak_mb": round(peaks[name] / 1e6),
                    "peak_times_trl": round(peaks[name] / peaks["trl"], 2),
                }


def rows(quick: bool) -> Iterator[Row]:
    """All rows."""
    yield from parts(quick)
    yield from whole_steps(quick)


def main() -> None:
    """Measure, print, and after a full run write down."""
    options = _results.parser(__doc__).parse_args()
    found = _results.gathered(rows(options.quick), as_json=options.json)
    note = (
        "`share_of_step` is of generation, teacher and student together; `times_generation` is "
        "against generation for all prompts at once, round by round. `recomputed`: activations, in "
        "the backward pass; the weights, gradients and state of AdamW of both are the same bytes."
    )
    _results.finish("on_policy", "An on-policy step", found, options, note=note)


if __name__ == "__main__":
    main()
