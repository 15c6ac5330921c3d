"""Optimiser steps in which the student writes some of the answers itself, before it learns."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dominie.core.distributed import all_gather, broadcast_from_main, rank, world_size
from dominie.data.batch import Batch, Row
from dominie.training.checkpoints import by_step
from dominie.training.dataloader import FixedRows, IndexedRow
from dominie.training.metric_sums import MetricsLog
from dominie.training.rollout_figures import RolloutFigures
from dominie.training.rollout_plan import Planned, RolloutPlan
from dominie.training.rollouts import Rollout, RolloutFiles, RolloutKey
from dominie.training.stage_sources import StageTraining
from dominie.training.student_answers import AnswerWriter, answer_writer, check_apart

logger = logging.getLogger(__name__)

#: Sums a tensor over ranks.
Reduce = Callable[[Tensor], Tensor]


class OnPolicyRows:
    """A step source whose conversations end, in part, with answers of the student as it is.

    Every conversation of the steps keeps its place in the order and the micro-batches of its
    source. A coin of its own decides whether the student writes its answer anew; answers are
    generated for a whole optimiser step at once, by all ranks, and are on disk before they are
    used: a run that is resumed reads them again.

    Args:
        planned: the same steps with the answers of the data.
        plan: which of their conversations the student answers.
        writer: has the student answer.
        files: where the answers are kept.
        figures: what is counted of them.
    """

    def __init__(
        self,
        planned: FixedRows,
        plan: RolloutPlan,
        writer: AnswerWriter,
        *,
        files: RolloutFiles,
        figures: RolloutFigures,
    ) -> None:
        self.planned, self.plan, self.writer = planned, plan, writer
        self.files, self.figures = files, figures
        self.sources, self.steps = planned.sources, planned.steps
        self.micro_batches = planned.micro_batches
        self.one_source_per_step = planned.one_source_per_step
        self._first = -1  # step of the rollouts that are in memory
        self._plans: dict[int, list[Planned]] = {}
        self._rollouts: Mapping[RolloutKey, Rollout] = {}
        self._keys: list[list[RolloutKey | None]] = []  # of this rank's micro-batches, by span
        self._batches: list[Batch] = []
        self._values: list[Tensor] = []

    def __len__(self) -> int:
        return len(self.planned)

    def micro_batch(self, step: int, number: int) -> Batch:
        """A micro-batch as the data have it."""
        return self.planned.micro_batch(step, number)

    def conversations(self, step: int) -> list[dict[str, Any]]:
        """The conversations of a step, those that the student answered marked `on_policy`."""
        plan = self._plans.get(step) or self.plan.of_step(step)
        entries = self.planned.conversations(step)
        for entry, each in zip(entries, plan, strict=True):
            if (rollout := self._rollouts.get(each.key) if each.key else None) is not None:
                entry["tokens"] = len(rollout.prompt) + len(rollout.answer)
                entry["on_policy"] = True
        return entries

    def answered(self, step: int, numbers: Sequence[int]) -> list[Batch]:
        """Micro-batches of a step with the student's answers, which are generated if need be.

        All ranks call it at once, before the first forward pass of the step.

        Args:
            step: counted from 0; the student is as it is before it.
            numbers: of the micro-batches of this rank.

        Raises:
            RunError: the answers cannot be written.
        """
        rollouts = self._of_step(step)
        rows: list[IndexedRow] = []
        keys: dict[int, RolloutKey] = {}  # by the identity of a row
        for each in self._plans[step]:
            row: Row = self.planned.row(each.source, each.row)
            if each.key is not None:
                row = rollouts[each.key].as_row(self.plan.turn(each).answer)
                keys[id(row)] = each.key
            rows.append((each.source, row))
        laid = self.planned.lay_out(rows)
        self._batches = [self.planned.collator(laid[number]) for number in numbers]
        self._keys = [
            [keys.get(id(row)) for members in laid[number] for _, row in members]
            for number in numbers
        ]
        self._values = []
        self.figures.add_step(
            (self.sources[each.source], rollouts[each.key] if each.key else None)
            for each in self._plans[step]
        )
        return self._batches

    def measure(self, per_token: Tensor) -> None:
        """Take in [N, columns] of a micro-batch, in the order of `answered` (`Losses`)."""
        self._values.append(per_token)

    def end_step(self, step: int, columns: Sequence[str]) -> None:
        """Write the divergence of every token of the answers of this rank's micro-batches.

        Args:
            step: counted from 0.
            columns: names of the columns that were measured.
        """
        if not self._values:
            return
        chosen = [columns.index(name) for name in ("divergence", "next_token")]
        values = torch.cat(self._values)[:, chosen].double().cpu().numpy()
        counts = [batch.positions.numel() for batch in self._batches]
        at, found, apart = 0, {}, []
        for batch, keys, count in zip(self._batches, self._keys, counts, strict=True):
            start = at
            for span, key in zip(batch.spans, keys, strict=True):
                part = values[start : start + span.supervised]
                start += span.supervised
                self.figures.add_values(self.sources[span.source], part, own=key is not None)
                if key is not None:
                    found[key] = part[:, 0].tolist()
                    apart.append(self.writer.compare(key, part[:, 1].tolist()))
            at += count
        self._values = []
        if step == self._first:  # the student is still the one that answered
            check_apart([each for each in apart if each is not None], step=step + 1)
        if found:
            self.files.write_divergences(step + 1, rank(), found)

    def log_entry(self, reduce: Reduce, step: int) -> dict[str, dict[str, float]]:
        """For a line of `metrics.jsonl`, by source (`RolloutFigures`); warns of what goes wrong.

        Args:
            reduce: sums a tensor over ranks.
            step: of the line.
        """
        entry = self.figures.log_entry(reduce)
        if rank() == 0:
            self.figures.warn(entry, step)
        return entry

    # Answers ---------------------------------------------------------------------------------

    def _of_step(self, step: int) -> Mapping[RolloutKey, Rollout]:
        """The answers of the steps that are answered with this one."""
        every = self.plan.settings.every
        first = step - step % every
        if first != self._first:
            last = min(first + every, self.steps)
            self._plans = {n: self.plan.of_step(n) for n in range(first, last)}
            self._rollouts, self._first = self._read_or_generate(step, first), first
        return self._rollouts

    def _read_or_generate(self, step: int, first: int) -> Mapping[RolloutKey, Rollout]:
        """The answers for steps from `first` on, by the student as it is before `step`.

        Those on disk are taken if they are whole and the student's weights are still those that
        gave them; of a later step, whose student has moved on, if they are whole.
        """
        asked = self.plan.asked(self._plans.values(), first)
        if not asked:
            return {}
        weights = self.writer.weights_hash()

        def kept() -> Mapping[RolloutKey, Rollout] | None:
            rollouts, hashes = self.files.read(first + 1)
            wanted = {each.key for each in asked}
            if wanted <= rollouts.keys() and len(hashes) == 1:
                if step > first or hashes == {weights}:
                    return {key: rollouts[key] for key in wanted}
                logger.warning(
                    "step %d: the answers on disk are of other weights than the student has now, "
                    "and are generated anew",
                    step + 1,
                )
            elif step > first:
                logger.warning(
                    "step %d: the answers of this step, written at step %d, are no longer whole, "
                    "and are generated anew by the student as it is now",
                    step + 1,
                    first + 1,
                )
            self.files.remove(first + 1)
            checkpoints = by_step(self.files.folder.parent / "checkpoints")
            steps = [int(path.name.rpartition("-")[2]) for path in checkpoints]
            self.files.prune(min(steps) + 1 if steps else 1)
            return None

        if (found := broadcast_from_main(kept)) is not None:
            return found
        began = time.perf_counter()
        mine = self.writer.write(asked[rank() :: world_size()])
        self.files.write(first + 1, rank(), weights, mine)
        found = {rollout.key: rollout for part in all_gather(mine) for rollout in part}
        self.figures.seconds += time.perf_counter() - began
        return found


def step_batches(
    trainer: Any, fetched: Sequence[Mapping[str, Any]], device: torch.device
) -> list[Batch]:
    """The micro-batches of the optimiser step that begins, on this rank and its device.

    The student's answers are those of now: the loader fetches ahead, when it was another.

    Args:
        trainer: a `DistillationTrainer`.
        fetched: by its data loader.
        device: of the student.
    """
    steps: OnPolicyRows | None = trainer.on_policy
    if steps is None:
        return [Batch.from_dict(batch).to(device) for batch in fetched]
    with trainer.accelerator.autocast():
        made = steps.answered(trainer.state.global_step, [batch["number"] for batch in fetched])
    return [batch.to(device) for batch in made]


def on_policy_rows(
    stage: StageTraining, planned: FixedRows, student: nn.Module, tokenizer: Any, log: MetricsLog
) -> OnPolicyRows | None:
    """The steps of a stage with answers of its student; None where it answers nothing.

    Args:
        stage: what is trained on and how.
        planned: its steps with the answers of the data.
        student: the model that is trained.
        tokenizer: the student's.
        log: `metrics.jsonl`.
    """
    fractions = [source.on_policy for source in stage.active]
    if not any(fractions):
        return None
    files = RolloutFiles(stage.folder / "rollouts")
    if rank() == 0:
        files.write_tokenizer(tokenizer)
    settings, seed = stage.rollouts, stage.settings.seed
    return OnPolicyRows(
        planned,
        RolloutPlan(
            planned,
            fractions,
            settings=settings,
            seed=seed,
            max_length=stage.settings.max_length,
        ),
        answer_writer(stage, student, tokenizer, files.folder),
        files=files,
        figures=RolloutFigures(
            [source.name for source in stage.active if source.on_policy],
            log.read(),
            grown=settings.grown_at(planned.steps),
        ),
    )
