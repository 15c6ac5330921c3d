"""Tiny models and a hand-driven trainer, so that a test can look at the gradient of one step."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import tiny_folder
from transformers import MistralConfig, MixtralConfig, set_seed
from transformers.models.mistral import MistralForCausalLM
from transformers.models.mixtral import MixtralForCausalLM

from dominie.data.batch import Row
from dominie.losses.objective import Objective
from dominie.losses.terms import LossTerms
from dominie.models import packed_attention
from dominie.models.info import model_flops
from dominie.models.spec import Model
from dominie.teachers import Teacher
from dominie.training.counters import FlopsMeter
from dominie.training.dataloader import Collator, FixedRows, Mix
from dominie.training.loss_forward import fused_layers, loss_in_forward
from dominie.training.metric_sums import MetricsLog
from dominie.training.monitoring import Monitor
from dominie.training.settings import TrainSettings, training_arguments
from dominie.training.source_weights import SourceWeights
from dominie.training.trainer import DistillationTrainer

sys.path.insert(0, str(Path(__file__).parent))  # importlib mode puts no folder on the path

SIZES = {
    "vocab_size": 61,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
}


@pytest.fixture
def student() -> MistralForCausalLM:
    """A Mistral of two layers in float64."""
    set_seed(1)
    return MistralForCausalLM(MistralConfig(**SIZES, sliding_window=None)).double()


@pytest.fixture
def teacher_model() -> MixtralForCausalLM:
    """A Mixtral of two layers in float64."""
    set_seed(2)
    config = MixtralConfig(**SIZES, num_local_experts=3, experts_implementation="eager")
    return MixtralForCausalLM(config).double().eval().requires_grad_(False)


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Model]:
    """A student and a teacher of other weights; a file of tests may have models of its own."""
    folder, specs = tmp_path_factory.mktemp("models"), {}
    for seed, name in enumerate(("student", "teacher")):
        tiny_folder(folder / name, seed=seed, initializer_range=0.2)
        specs[name] = Model(path=str(folder / name))
    return specs


GradientOf = Callable[..., dict[str, torch.Tensor]]


@pytest.fixture
def step_gradient(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> GradientOf:
    """The gradient of one optimiser step over all given rows, taken by the real trainer.

    Packed rows are attended by conversation, short as they are.
    """
    monkeypatch.setattr(packed_attention, "_LEAST", 0)
    from gradients import StepGradient

    def gradient(
        model: Any,
        rows: Sequence[Sequence[Row]],
        terms: Sequence[LossTerms],
        *,
        teacher: Teacher | None = None,
        routes: Sequence[int] | None = None,
        micro_batch: int = 8,
        pack_to: int | None = None,
        pairs: Sequence[tuple[int, int]] = (),
        gradient_checkpointing: bool = False,
        seed: int = 0,
        source_gradients: bool = False,
        micro_batches_ahead: int = 1,
        balance: SourceWeights | None = None,
        use_liger_kernel: bool = False,
    ) -> dict[str, torch.Tensor]:
        batch = sum(len(source) for source in rows)
        settings = TrainSettings(
            batch=batch,
            micro_batch=micro_batch,
            teacher_micro_batch=micro_batches_ahead * micro_batch,
            steps=1,
            max_length=64,
            gradient_checkpointing=gradient_checkpointing,
            source_gradients=source_gradients,
            arguments={
                "max_grad_norm": 1e9,
                "use_cpu": True,
                "use_liger_kernel": use_liger_kernel,
            },
        )
        names = [str(i) for i in range(len(rows))]
        sizes = {name: len(source) for name, source in zip(names, rows, strict=True)}
        shares = {name: float(size) for name, size in sizes.items()}
        mix = Mix(sizes, shares, batch=batch, micro_batch=micro_batch, steps=1, seed=0)
        collator = Collator(routes or [0] * len(rows), pack_to)
        arguments = training_arguments(settings, tmp_path / "checkpoints", steps=1, ranks=1)
        arguments.save_strategy = "no"
        kept, objective = StepGradient(), Objective(terms)
        with fused_layers(model, arguments), loss_in_forward(model, objective, pairs):
            trainer = DistillationTrainer(
                model,
                arguments,
                settings,
                objective=objective,
                steps=FixedRows(dict(zip(names, rows, strict=True)), mix, collator),
                teacher=teacher,
                monitor=Monitor(
                    sources=names,
                    log=MetricsLog(tmp_path / "metrics.jsonl"),
                    flops=FlopsMeter(model_flops(model), [None] * len(rows), peak=None),
                ),
                balance=balance,
                callbacks=[kept],
            )
            state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
            torch.manual_seed(seed)
            trainer.resume(None)
            model.load_state_dict(state)
        model.zero_grad()
        return kept.gradient

    return gradient
