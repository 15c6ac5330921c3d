"""The one trainer: transformers.Trainer with teachers and a loss summed over tokens."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import PrinterCallback, ProgressCallback, TrainerCallback, TrainingArguments

from dominie.core.distributed import broadcast_from_main
from dominie.core.errors import InputError, RunError
from dominie.data.batch import Batch
from dominie.losses.objective import Objective
from dominie.losses.targets import Signal
from dominie.losses.tiles import sum_precision
from dominie.teachers import Teacher, TeacherPrefetch
from dominie.training.callbacks import (
    flat,
    flat_evaluation,
    keep_tensorboard,
    rewind_tensorboard,
    standard_callbacks,
)
from dominie.training.checkpoints import CheckpointedTrainer
from dominie.training.counters import Counters
from dominie.training.dataloader import MicroBatches, StepSource, micro_batch_loader, unwrap
from dominie.training.loss_forward import DistillationInputs
from dominie.training.metric_sums import MetricSums, grad_norms_by_source, read_both, sources_of
from dominie.training.monitoring import ExpertCollapseWarning, Monitor, SpikeGuard, broken_step
from dominie.training.on_policy import OnPolicyRows, step_batches
from dominie.training.settings import TrainSettings
from dominie.training.source_weights import SourceWeights, weighted


def _divided_already(*_: Any, **__: Any) -> Tensor:
    """Its presence keeps transformers from dividing by the accumulation steps."""
    raise AssertionError("compute_loss is overridden")


class DistillationTrainer(CheckpointedTrainer):
    """Trains one stage.

    The loss of an optimiser step is the sum of its losses over all micro-batches and ranks,
    divided once by the supervised tokens of them all.

    Args:
        model: the student, within `loss_in_forward`.
        args: from `training_arguments`.
        settings: the stage's `train`.
        objective: the loss that the student's forward pass returns.
        steps: where micro-batches come from.
        teacher: provides targets for every batch, None when no source has a teacher.
        monitor: what is measured.
        balance: what the tokens of a source weigh; None is 1 each.
        callbacks: progress displays and the like.
    """

    control: Any

    def __init__(
        self,
        model: nn.Module,
        args: TrainingArguments,
        settings: TrainSettings,
        *,
        objective: Objective,
        steps: StepSource,
        teacher: Teacher | None,
        monitor: Monitor,
        balance: SourceWeights | None = None,
        callbacks: Sequence[TrainerCallback] = (),
    ) -> None:
        self.steps, self.teacher, self.monitor = steps, teacher, monitor
        self.on_policy = steps if isinstance(steps, OnPolicyRows) else None
        self.balance = balance or SourceWeights(monitor.sources)
        self.metrics = MetricSums(monitor.sources, objective, monitor.terms)
        self.counters, self.copied = Counters(monitor.flops), [monitor.log.path]
        ahead = settings.micro_batches_ahead(args.world_size)
        self._prefetch = TeacherPrefetch(teacher, ahead) if teacher else None
        self._spikes, self._collapse = SpikeGuard(settings.max_spike), ExpertCollapseWarning()
        if monitor.validation is None:
            args.eval_strategy = "no"
        dataset = MicroBatches(steps)
        super().__init__(
            model=model,
            args=args,
            train_dataset=dataset,
            eval_dataset=dataset if monitor.validation else None,
            data_collator=unwrap,
            callbacks=[
                *(self._spikes, *standard_callbacks(self.balance), *callbacks),
            ],
            compute_loss_func=_divided_already,
        )
        self.remove_callback(PrinterCallback)
        self.remove_callback(ProgressCallback)
        keep_tensorboard(self.callback_handler.callbacks, self.stage_folder)
        self._step_loss = torch.zeros((), device=args.device)
        if settings.source_gradients and self.is_deepspeed_enabled:
            raise InputError(
                "DeepSpeed's backward pass cannot be run source by source",
                where="train.source_gradients",
                do="remove it, or mix by steps (train.mixing: steps), whose norms cost nothing",
            )
        self._source_gradients = settings.source_gradients and not steps.one_source_per_step
        self._unmeasured: list[Batch] = []  # of the step that is about to begin
        self._source_norms: dict[str, float] = {}  # since the last line of metrics

    @property
    def stage_folder(self) -> Path:
        """The stage's folder."""
        return Path(self.args.output_dir).parent

    # Batches ---------------------------------------------------------------------------------

    def get_train_dataloader(self) -> DataLoader[Any]:
        """The micro-batches of all steps, split over the ranks."""
        loader = micro_batch_loader(self.train_dataset, self.steps, self.args)
        prepared: DataLoader[Any] = self.accelerator.prepare(loader)
        return prepared

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Tensor]:
        """The micro-batches of one optimiser step, and its supervised tokens over all ranks."""
        batches = [batch for _, batch in zip(range(num_batches), epoch_iterator, strict=False)]
        found, step = step_batches(self, batches, device), self.state.global_step + 1
        counts = self.counters.add(found, self.accelerator, step=step)
        weights = self.balance.of_step(counts, step=step)
        found = weighted(found, weights, sum_precision(self.model.dtype))
        self._step_source = found[0].spans[0].source  # used if a step has only one
        if self._prefetch:
            ahead = self._prefetch.micro_batches
            self._prefetch.start_step(found, partial(self.train_dataset.first_spans, step, ahead))
        if self._source_gradients and self._logs_this_step():
            self._unmeasured = found
        return [batch.as_dict() for batch in found], torch.tensor(max(sum(counts), 1))

    # The loss --------------------------------------------------------------------------------

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The micro-batch's share of the step's loss, times the ranks it is averaged over."""
        batch = Batch.from_dict(inputs)
        signal = self._prefetch.next if self._prefetch else None
        if self.on_policy and signal:
            signal = self.on_policy.figures.timed(signal)
        outputs = self._outputs(model, batch, signal, measured=self._logs_this_step())
        self.metrics.add(outputs["terms"], outputs["by_source"], outputs.get("routing"))
        if self.on_policy:
            self.on_policy.measure(outputs["per_token"])
        self.balance.measure(outputs["by_source"], self.metrics.objective.columns)
        loss = outputs["loss"] * self.accelerator.num_processes / num_items_in_batch
        self._step_loss += loss.detach().float()
        return (loss, outputs) if return_outputs else loss

    def _outputs(
        self,
        model: nn.Module,
        batch: Batch,
        compute_signal: Callable[[], Signal] | None,
        *,
        measured: bool,
    ) -> dict[str, Any]:
        """The outputs of the student's forward pass on a batch, given its teachers' targets."""
        try:
            signal = compute_signal() if compute_signal else None
            inputs = DistillationInputs(batch, signal, measured=measured)
            outputs: dict[str, Any] = model(inputs=inputs)
        except (ValueError, RunError) as error:  # values of the models that the losses refuse
            raise self._broken_step("the loss cannot be computed", str(error)) from error
        return outputs

    def training_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:
        """One micro-batch; before a step's first one the gradients of its sources, if asked for."""
        batches, self._unmeasured = self._unmeasured, []
        if batches:
            model.train()
            scale = self.accelerator.num_processes / num_items_in_batch
            norms = grad_norms_by_source(
                model,
                batches,
                sources_of(batches, len(self.metrics.sources), self.accelerator),
                loss_of=lambda batch: self._loss_of(model, batch) * scale,
                accelerator=self.accelerator,
            )
            self._source_norms |= {self.metrics.sources[i]: norm for i, norm in norms.items()}
        loss: Tensor = super().training_step(model, inputs, num_items_in_batch)
        return loss

    def _loss_of(self, model: nn.Module, batch: Batch) -> Tensor:
        """The summed loss of a batch, its teachers run on it alone."""
        compute_signal = partial(self.teacher.signal, batch) if self.teacher else None
        loss: Tensor = self._outputs(model, batch, compute_signal, measured=False)["loss"]
        return loss

    def _logs_this_step(self) -> bool:
        step, every = self.state.global_step + 1, max(1, int(self.state.logging_steps))
        return step in (1, self.state.max_steps) or step % every == 0

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        """The gradient's norm, once a step before the optimiser: where a broken step is stopped."""
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        loss, size = read_both(self._step_loss, norm)
        # fp16's loss scaler skips steps whose gradient is not finite, and goes on.
        if not math.isfinite(loss) or not (self.args.fp16 or math.isfinite(size)):
            raise self._broken_step(
                "the loss or its gradient is not finite; stopped before the optimiser step",
                f"loss {loss:.6g}, gradient norm {size:.6g}, terms {self.metrics.means()['terms']}",
                model,
            )
        if self._spikes.factor is not None:
            if self.accelerator.num_processes > 1:  # so that all ranks decide alike
                loss = float(self.accelerator.reduce(self._step_loss.clone(), reduction="mean"))
            if (median := self._spikes.exceeded_median(loss)) is not None:
                raise self._broken_step(
                    "the loss jumps; stopped before the optimiser step",
                    f"loss {loss:.6g}, the median of the steps before {median:.6g}",
                    do=self._spikes.advice,
                )
        self._step_loss.zero_()
        self.balance.end_step(self._sum_of_ranks)
        if self.on_policy:
            self.on_policy.end_step(self.state.global_step, self.metrics.objective.columns)
        if self.steps.one_source_per_step and len(self.steps.sources) > 1:
            self._source_norms[self.metrics.sources[self._step_source]] = size
        return norm

    def _broken_step(
        self,
        what: str,
        found: str,
        model: nn.Module | None = None,
        do: str | None = None,
    ) -> RunError:
        """The error that ends the stage before a step is taken; its details go to a file."""
        step = self.state.global_step + 1
        return broken_step(
            self.stage_folder,
            step=step,
            what=what,
            found=found,
            means=self.metrics.means(),
            model=model,
            conversations=self.steps.conversations(step - 1),
            do=do,
        )

    # Metrics ---------------------------------------------------------------------------------

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Complete what Trainer logs with terms and sources; write a line of `metrics.jsonl`."""
        if "learning_rate" not in logs:  # a summary, or an evaluation that writes its own line
            super().log(logs, start_time)
            return
        means = self.metrics.means(self._sum_of_ranks)
        self.metrics.reset()
        where = f"stage {self.stage_folder.name}, step {self.state.global_step}"
        self.monitor.check_divergence(means["sources"], self.metrics.objective, where=where)
        found = [*self.balance.log_entry().items()]
        if self.on_policy:
            found += self.on_policy.log_entry(self._sum_of_ranks, self.state.global_step).items()
        found += [(source, {"grad_norm": norm}) for source, norm in self._source_norms.items()]
        self._source_norms = {}
        for source, entry in found:
            means["sources"].setdefault(source, {}).update(entry)
        record = {
            "step": self.state.global_step,
            "epoch": self.monitor.epoch(self.state),
            "loss": sum(means["terms"].values()),
            "learning_rate": logs["learning_rate"],
            "grad_norm": logs.get("grad_norm"),
            **means,
            **self.counters.log_entry(self.accelerator.num_processes),
            **(self.on_policy.figures.seconds_entry() if self.on_policy else {}),
        }
        self._collapse.look(means.get("router"), self.state.global_step)
        if self.is_world_process_zero():
            self.monitor.log.append(record)
        rates = {key: record[key] for key in ("loss", "tokens", "tokens_per_second")}
        super().log({**logs, **rates, **flat(means)}, start_time)

    def _sum_of_ranks(self, tensor: Tensor) -> Tensor:
        summed: Tensor = self.accelerator.reduce(tensor.to(self.args.device), reduction="sum")
        return summed

    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        """Losses by source on the validation splits: the forgetting curve."""
        assert self.monitor.validation is not None
        sources, loss = self.monitor.validation.measure(self.model_wrapped, self.accelerator)
        if self.is_world_process_zero():
            record: dict[str, Any] = {"step": self.state.global_step, "evaluation": sources}
            record |= {} if loss is None else {"loss": loss}
            self.monitor.log.append({**record, "seconds": round(self.counters.seconds, 3)})
        found = flat_evaluation(sources, loss)
        self.log(found)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, found)
        return found

    def resume(self, checkpoint: Path | None) -> Any:
        """Train to the end, from a checkpoint or from the start."""
        self.drop_half_written()
        step = 0 if checkpoint is None else int(checkpoint.name.rpartition("-")[2])
        lines = checkpoint and checkpoint / self.monitor.log.path.name
        self.counters.go_on(broadcast_from_main(lambda: self.monitor.log.rewind(step, lines)))
        if self.is_world_process_zero():
            rewind_tensorboard(self.callback_handler.callbacks, step)
        try:
            return self.train() if checkpoint is None else self.go_on_from(checkpoint)
        finally:
            if self._prefetch:
                self._prefetch.close()
