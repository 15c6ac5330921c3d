"""An on-policy optimiser step by its parts: generation, teacher, student.

A student answers prompts, a teacher of the same shape marks the answers over the whole vocabulary,
and the student takes a step on them, as in a stage with `on_policy: 1`. Generation is run for all
prompts at once, as a stage does, and one prompt at a time; both take turns in every round, so that
a busy machine is busy for both. Seconds are medians of the rounds, ratios medians of the ratios of
the rounds. The models are small Mistrals with random weights, which never end an answer; on a GPU
they have the shape of a 1B model, in bfloat16.

    python benchmarks/on_policy.py [--quick] [--json]

``--quick`` ends within 50 seconds on two cores; a full run also writes a dated table to
``benchmarks/results``.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import _results
import torch
from _results import DEVICE, GPU, Row
from generation import random_mistral

from dominie.data.batch import collate
from dominie.losses.objective import Objective
from dominie.losses.terms import LossTerms, Prediction
from dominie.teachers import LocalTeacher
from dominie.toyworld.toy_models import word_tokenizer
from dominie.training.loss_forward import DistillationInputs, loss_in_forward
from dominie.training.rollouts import RolloutKey, RolloutSettings
from dominie.training.student_answers import AskedAnswer, StudentAnswers

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


def rows(quick: bool) -> Iterator[Row]:
    """One row for each part of a step."""
    shape = (256, 4) if quick else (2048, 16) if GPU else (512, 8)
    prompts, new, rounds = (16, 16, 2) if quick else (64 if GPU else 16, 64, 3)
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
            "part": part,
            "prompts": prompts,
            "new_tokens": new,
            "seconds": round(statistics.median(seconds), 3),
            "share_of_step": round(
                statistics.median(s / all_of for s, all_of in zip(seconds, whole, strict=True)), 3
            ),
            "times_generation": round(statistics.median(ratios), 2),
        }


def main() -> None:
    """Measure, print, and after a full run write down."""
    options = _results.parser(__doc__).parse_args()
    parts = _results.gathered(rows(options.quick), as_json=options.json)
    note = (
        "`share_of_step` is of generation, teacher and student together; `times_generation` is "
        "against generation for all prompts at once, round by round."
    )
    _results.finish("on_policy", "An on-policy step", parts, options, note=note)


if __name__ == "__main__":
    main()
