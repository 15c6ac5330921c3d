"""An optimiser step of every kind, taken on a GPU by the real trainer, is the step of the CPU."""

from __future__ import annotations

import json
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from gradients import StepGradient, ragged_rows
from tiny import tiny_folder, tiny_model

from dominie.losses import tiles
from dominie.losses.terms import Attention, LossTerms, NextToken, Prediction, Router
from dominie.models.info import model_flops
from dominie.models.loading import load_student
from dominie.models.spec import Model
from dominie.teachers import AdapterTeacher, LocalTeacher
from dominie.training.settings import Lora, TrainSettings, training_arguments
from dominie.training.stage_sources import StageSource, StageTraining
from dominie.training.train_stage import LoadedModels, build_trainer

SIZES = {
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "initializer_range": 0.15,
}
LABELS = LossTerms(next_token=NextToken())
TAUGHT = LossTerms(prediction=Prediction())
KD = LossTerms(next_token=NextToken(weight=0.3), prediction=Prediction(temperature=2.0))
WITH_ATTENTION = LossTerms(prediction=Prediction(), attention=Attention(weight=1.5))
#: Relative: of float32 whose sums are taken in another order, some of them from three of tf32; and
#: of 16-bit products.
FLOAT32, BFLOAT16 = 1e-3, 6e-2


@dataclass(frozen=True)
class Kind:
    """What is learnt, from whom and how.

    Attributes:
        sources: of each its loss and its teacher.
        student: family of the student; the teachers are Mixtrals but where they are its base.
        options: further settings of the stage.
        cached: whether the teacher speaks from a cache.
        fused: whether the student has Liger's layers on a GPU, and on the CPU its own.
        tolerance: of the whole gradient and of each parameter's.
    """

    sources: tuple[tuple[LossTerms, str | None], ...]
    student: str = "mistral"
    options: dict[str, Any] = field(default_factory=dict)
    cached: bool = False
    fused: bool = False
    tolerance: float = FLOAT32


KINDS = {
    "next token": Kind(((LABELS, None),)),
    "next token, DFT": Kind(((LossTerms(next_token=NextToken(kind="dft")), None),)),
    "KD": Kind(((KD, "first"),)),
    "KD + attention": Kind(((WITH_ATTENTION, "first"),)),
    "KD + attention, recomputed": Kind(
        ((WITH_ATTENTION, "first"),), options={"gradient_checkpointing": True}
    ),
    "DAE": Kind(((TAUGHT, "first"), (TAUGHT, "second"))),
    "labels and a teacher": Kind(((LABELS, None), (KD, "first"))),
    "cache": Kind(((TAUGHT, "first"),), cached=True),
    "mixture of experts": Kind(
        ((LossTerms(next_token=NextToken(), router=Router(weight=0.5, z_weight=0.1)), None),),
        student="mixtral",
    ),
    "LoRA over the teacher": Kind(
        ((KD, "base"),), options={"lora": Lora(r=4, target_modules=["q_proj", "down_proj"])}
    ),
    "fused layers": Kind(((WITH_ATTENTION, "first"),), fused=True),
    "KD in bf16": Kind(((KD, "first"),), options={"precision": "bf16"}, tolerance=BFLOAT16),
    "KD + attention in bf16": Kind(
        ((WITH_ATTENTION, "first"),), options={"precision": "bf16"}, tolerance=BFLOAT16
    ),
    "mixture of experts in bf16": Kind(
        ((LABELS, None),), student="mixtral", options={"precision": "bf16"}, tolerance=BFLOAT16
    ),
}


@pytest.mark.parametrize("kind", [k for k in KINDS if not KINDS[k].cached])
def test_a_step_is_that_of_the_cpu(kind, device, tmp_path):
    if KINDS[kind].fused and device.type == "cuda":
        pytest.importorskip("liger_kernel", reason="the fused layers are Liger's")
    assert_same_step(KINDS[kind], device, tmp_path)


def test_so_is_one_from_a_cache(device, tmp_path):
    for package in ("pyarrow", "pcodec"):
        pytest.importorskip(package, reason=f"a cache's files need {package}")
    assert_same_step(KINDS["cache"], device, tmp_path)


@pytest.mark.parametrize("kind", ["next token", "KD", "KD in bf16"])
def test_so_is_one_of_several_vocabulary_tiles(kind, device, tmp_path, monkeypatch):
    rows = []
    count = tiles.rows_per_tile

    def counted(*args: Any) -> int:
        rows.append(count(*args))
        return rows[-1]

    monkeypatch.setattr(tiles, "tile_elements", lambda device: 16 * 61)
    monkeypatch.setattr(tiles, "rows_per_tile", counted)
    assert_same_step(KINDS[kind], device, tmp_path)
    assert rows
    assert max(rows) <= 16, "of some 30 supervised tokens"


def assert_same_step(kind: Kind, device: torch.device, folder: Path) -> None:
    """The loss and gradient of a step on a device beside those of the CPU."""
    expected_loss, expected = step(kind, torch.device("cpu"), folder / "expected")
    loss, found = step(kind, device, folder / "found")
    assert loss == pytest.approx(expected_loss, rel=kind.tolerance / 3)
    assert found.keys() == expected.keys()
    whole = torch.cat([gradient.flatten() for gradient in expected.values()]).norm()
    assert whole > 1e-3
    for name, gradient in found.items():
        away = (gradient - expected[name]).norm()
        assert away <= kind.tolerance * (expected[name].norm() + 0.02 * whole), name


def step(kind: Kind, device: torch.device, folder: Path) -> tuple[float, dict[str, torch.Tensor]]:
    """The loss and the gradient, on the CPU, of one step of a kind on a device."""
    folder.mkdir()
    names = [f"source {i}" for i in range(len(kind.sources))]
    rows = [ragged_rows(8, seed) for seed in range(len(names))]
    on_cpu = device.type == "cpu"
    fused = {"use_liger_kernel": True} if kind.fused and not on_cpu else {}
    settings = TrainSettings(
        batch=8 * len(names), micro_batch=4, steps=1, max_length=64, packing=False,
        arguments={"max_grad_norm": 1e9, "use_cpu": on_cpu, **fused}, **kind.options,
    )  # fmt: skip
    student = load_student(
        Model(path=str(tiny_folder(folder / "student", kind.student, seed=1, **SIZES))),
        lora=settings.lora,
        precision=settings.precision,
        gradient_checkpointing=settings.gradient_checkpointing,
    )
    torch.manual_seed(5)
    for name, parameter in student.named_parameters():
        if "lora_B" in name:  # else it is its base
            torch.nn.init.normal_(parameter, std=0.1)
    flops = model_flops(student)
    teachers = {name: taught_by(name, student, device) for _, name in kind.sources if name}
    caches = {}
    if kind.cached:
        caches = {name: written(each.model, rows[0], folder) for name, each in teachers.items()}
        teachers = {}
    sources = [
        StageSource(
            name=name, train=own, validation=[], share=1.0, terms=terms, teacher=teacher,
            cache=teacher if kind.cached else None,
        )
        for name, own, (terms, teacher) in zip(names, rows, kind.sources, strict=True)
    ]  # fmt: skip
    stage = StageTraining(folder=folder, sources=sources, settings=settings)
    models = LoadedModels(student=student, flops=flops, teachers=teachers, caches=caches)
    arguments = training_arguments(settings, folder / "checkpoints", steps=1, ranks=1)
    arguments.save_strategy = "no"
    kept = StepGradient()
    with build_trainer(stage, models, arguments, callbacks=[kept]) as trainer:
        assert trainer.args.device.type == device.type
        trainer.resume(None)
    (line, *_) = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return line["loss"], {name: gradient.float().cpu() for name, gradient in kept.gradient.items()}


def taught_by(name: str, student: Any, device: torch.device) -> LocalTeacher:
    """The teacher of a name: the student's base, or a Mixtral of its own."""
    if name == "base":
        return AdapterTeacher(student)
    seed = {"first": 2, "second": 3}[name]
    return LocalTeacher(
        tiny_model("mixtral", seed=seed, **SIZES).eval().requires_grad_(False).to(device)
    )


def written(model: Any, rows: Any, folder: Path) -> Any:
    """A cache of what a model says about some rows, on the CPU: sampling on a GPU may differ."""
    from dominie.data.shards import ShardWriter
    from dominie.teachers.cache import Cache, Identity, create
    from dominie.teachers.cache_sampling import CacheSettings
    from dominie.teachers.cache_writer import entries, measure_token_stats
    from dominie.teachers.cached import CachedTeacher

    model, settings = deepcopy(model).cpu(), CacheSettings(scheme="top", k_max=20)
    identity = Identity(
        teacher="t", revision=None, weights="w", tokenizer="k", vocabulary=61, temperature=1.0,
        scheme=settings.identity,
    )  # fmt: skip
    create(
        folder / "cache",
        identity,
        measure_token_stats(model, rows, 61, settings, temperature=1.0),
        {},
    )
    cache = Cache(folder / "cache", identity, remedy="")
    with ShardWriter(folder / "cache", owner=cache.owner) as writer:
        writer.add(
            entries(model, rows, cache.vocabulary, settings, temperature=1.0, owner=cache.owner)
        )
    return CachedTeacher(cache)
