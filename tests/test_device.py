"""Training, caches, scores and answers on a simulated CUDA device: nothing mixed, few waits.

Values are compared with those of the CPU. How fast any of it is only a GPU can tell.
"""

from __future__ import annotations

import contextlib
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from tiny import tiny_config, tiny_model
from transformers import TrainerCallback, TrainingArguments

pytest.importorskip("triton", reason="a GPU is given Triton's kernels")

from simulated_cuda import CUDA, Waits, simulated_cuda, to_cuda

from dominie.data.batch import Row, collate
from dominie.data.conversations import Conversation
from dominie.data.shards import ShardWriter
from dominie.data.tokenization import Encoded
from dominie.evaluation.likelihood import choice
from dominie.evaluation.metrics import METRICS
from dominie.evaluation.scoring import LIKENESSES, generate_outputs
from dominie.evaluation.task import questions
from dominie.generation.generator import GenerationRequest, Sampling, generate_all
from dominie.generation.local import LocalGenerator
from dominie.losses.forward_pass import BySource
from dominie.losses.objective import Objective
from dominie.losses.terms import Attention, LossTerms, NextToken, Prediction, Router
from dominie.models import router_init
from dominie.models.head import check_head
from dominie.models.info import model_flops
from dominie.models.matching import reorder_vocabulary
from dominie.models.upcycling import Upcycle
from dominie.teachers import LocalTeacher, RoutedTeacher, Teacher
from dominie.teachers.cache import Cache, Identity, create
from dominie.teachers.cache_sampling import CacheSettings
from dominie.teachers.cache_writer import entries, fidelity, measure_token_stats, tiles_of_logits
from dominie.teachers.cached import CachedTeacher
from dominie.toyworld.toy_models import word_tokenizer
from dominie.training.counters import FlopsMeter
from dominie.training.dataloader import Collator, FixedRows, Mix
from dominie.training.loss_forward import loss_in_forward
from dominie.training.metric_sums import MetricsLog
from dominie.training.monitoring import Monitor, Validation
from dominie.training.settings import TrainSettings, training_arguments
from dominie.training.trainer import DistillationTrainer

VOCABULARY = 61


def test_what_is_on_two_devices_is_refused_and_what_waits_is_counted():
    with simulated_cuda() as device:
        there, here = torch.arange(4.0, device="cuda:0"), torch.arange(4.0)
        assert str(there.device) == "cuda:0"
        for mix in (lambda: there + here, lambda: torch.stack([here, there]), lambda: here @ there):
            with pytest.raises(RuntimeError, match="all tensors to be on the same device"):
                mix()
        assert (there + torch.tensor(1.0)).device == CUDA, "a number is on no device"
        assert not device.take()
        waiting = {
            "_local_scalar_dense": lambda: bool((there > 1).all()),
            "nonzero": lambda: (there > 1).nonzero(),
            "a mask as an index": lambda: there[there > 1],
            "equal": lambda: torch.equal(there, there),
            "bincount": lambda: torch.bincount(there.long()),
            "_unique2": lambda: torch.unique(there),
            "copy of an index": lambda: there[torch.tensor([1, 2])],
            "copy to the CPU": lambda: there.tolist(),
            "copy from the CPU": lambda: here.to("cuda:0"),
            "copy from pageable memory": lambda: here.to("cuda:0", non_blocking=True),
        }
        for what, act in waiting.items():
            act()
            (found,) = device.take().elements()
            assert found.startswith(f"{what} at test_device.py:")
        there[there > 1] = 0.0
        copied = here.pin_memory().to("cuda:0", non_blocking=True)
        assert not device.take()
        assert copied.tolist() == here.tolist()


def rows_of(count: int, seed: int) -> list[Row]:
    rng = np.random.default_rng(seed)
    found: list[Row] = []
    for _ in range(count):
        length = int(rng.integers(4, 12))
        supervised = rng.random(length) < 0.6
        supervised[-1] = True
        found.append(Encoded(rng.integers(0, VOCABULARY, length).tolist(), supervised.tolist()))
    return found


ROWS = {"a": rows_of(4, 1), "b": rows_of(4, 2)}


def frozen(family: str, seed: int = 1) -> Any:
    model = tiny_model(family, seed=seed, num_hidden_layers=1)
    return model.eval().requires_grad_(False)


@dataclass(frozen=True)
class Stage:
    """The loss of each source, the families of the teachers, and the teacher of each source.

    `waits` are those of a micro-batch: transformers looks once in the forward pass of each model
    whether its rows are packed.
    """

    terms: Sequence[LossTerms]
    waits: int
    teachers: Mapping[str, str] = field(default_factory=dict)
    routes: Sequence[str | None] = ("t", "t")
    student: str = "mistral"
    attention: bool = False
    packed: bool = True


BOTH = LossTerms(next_token=NextToken(), prediction=Prediction())
MAPS = LossTerms(prediction=Prediction(), attention=Attention())
BALANCED = LossTerms(prediction=Prediction(), router=Router(z_weight=0.01))
LABELS = LossTerms(next_token=NextToken())
TWO = {"t": "mistral", "u": "llama"}
STAGES = {
    "KD with attention": Stage([MAPS, MAPS], 2, {"t": "mixtral"}, attention=True),
    "KD with attention, padded": Stage(
        [MAPS, MAPS], 2, {"t": "mistral"}, attention=True, packed=False
    ),
    "DAE": Stage([BOTH, BOTH], 3, TWO, "tu"),
    "a mixture; a source without teacher": Stage(
        [BALANCED, LABELS], 2, {"t": "mistral"}, ["t", None], student="qwen3_moe"
    ),
}


class CountedSteps(TrainerCallback):
    """What waited before, in and after the micro-batches of a step."""

    def __init__(self, waits: Waits | None) -> None:
        self.waits = waits
        self.found: list[Counter[str]] = []

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        """The batches of the step have been copied."""
        self._take()

    def on_substep_end(self, *_: Any, **__: Any) -> None:
        """A micro-batch has run."""
        self._take()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """The last micro-batch has run, and the optimiser."""
        self._take()

    def on_train_end(self, *_: Any, **__: Any) -> None:
        """Metrics have been written."""
        self._take()

    def _take(self) -> None:
        if self.waits is not None:
            self.found.append(self.waits.take())


def trained(
    stage: Stage,
    folder: Path,
    waits: Waits | None = None,
    *,
    teacher: Teacher | None = None,
    measured: bool = False,
) -> tuple[list[dict[str, Any]], CountedSteps]:
    """The lines of metrics of a logged step of two micro-batches, and what waited in it.

    Args:
        stage: what is trained.
        folder: for the files.
        waits: of the simulated device; None is the CPU.
        teacher: in place of the stage's.
        measured: whether norms by source and the losses of held-out rows are, too.
    """
    folder.mkdir()
    student = tiny_model(stage.student, num_hidden_layers=1)
    models = {name: frozen(kind) for name, kind in stage.teachers.items()}
    for model in models.values() if waits is not None else ():
        to_cuda(model)
    pairs = [(0, 0)] if stage.attention else []
    if teacher is None:
        layers = [layer for _, layer in pairs]
        local = {name: LocalTeacher(m, attention_layers=layers) for name, m in models.items()}
        teacher = RoutedTeacher(local, list(stage.routes))
    settings = TrainSettings(
        batch=8, micro_batch=4, steps=1, max_length=24, source_gradients=measured
    )
    arguments = training_arguments(settings, folder / "checkpoints", steps=1, ranks=1)
    arguments.save_strategy = "no"
    routes = [list(dict.fromkeys(stage.routes)).index(route) for route in stage.routes]
    collator = Collator(routes, 24 if stage.packed else None)
    sizes, shares = {name: len(rows) for name, rows in ROWS.items()}, dict.fromkeys(ROWS, 0.5)
    mix = Mix(sizes, shares, batch=8, micro_batch=4, steps=1, seed=0)
    objective, counted = Objective(stage.terms), CountedSteps(waits)
    sources: Any = [SimpleNamespace(name=n, validation=r, share=0.5) for n, r in ROWS.items()]
    held_out = Validation(sources, objective, collator=collator, teacher=teacher, batch=4)
    with loss_in_forward(student, objective, pairs):
        trainer = DistillationTrainer(
            student,
            arguments,
            settings,
            objective=objective,
            steps=FixedRows(ROWS, mix, collator),
            teacher=teacher,
            monitor=Monitor(
                sources=list(ROWS),
                log=MetricsLog(folder / "metrics.jsonl"),
                flops=FlopsMeter(model_flops(student), [None, None], peak=None),
                validation=held_out if measured else None,
            ),
            callbacks=[counted],
        )
        trainer.resume(None)
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines], counted


@contextlib.contextmanager
def trainers_device() -> Iterator[Waits]:
    """Within, trainers train on a simulated device."""
    there = property(lambda arguments: (arguments._setup_devices, CUDA)[1])
    with (
        simulated_cuda() as waits,
        mock.patch.object(TrainingArguments, "device", there),
        mock.patch.object(Accelerator, "device", CUDA),
    ):
        yield waits


def figures(lines: Sequence[Mapping[str, Any]]) -> list[Any]:
    """All numbers that do not tell the time, in order."""
    found: list[Any] = []
    for line in lines:
        kept = {k: v for k, v in line.items() if "second" not in k and k != "throughput"}
        found += (float(x) for x in torch.utils._pytree.tree_leaves(kept) if x is not None)
    return found


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.full] if "padded" in n else []) for n in STAGES]
)
def test_a_step_waits_little_and_is_that_of_the_cpu(name, tmp_path):
    stage = STAGES[name]
    on_cpu, _ = trained(stage, tmp_path / "cpu")
    with trainers_device() as device:
        lines, counted = trained(stage, tmp_path / "device", device)
    assert figures(lines) == pytest.approx(figures(on_cpu), rel=1e-4, abs=1e-5)
    check_waits(counted, stage.waits)
    parts = ("before", "first micro-batch", "last micro-batch and end", "line of metrics")
    for part, found in zip(parts, counted.found, strict=True):
        print(f"{part}: {found.total()}", *(f"  {n} {what}" for what, n in found.items()), sep="\n")


def check_waits(counted: CountedSteps, most: int) -> None:
    """Of a logged step of two micro-batches."""
    start, first, end, line = counted.found
    tables = [each for each in first if each.startswith("copy from the CPU at forward_pass.py")]
    assert start.total() <= 1, f"batches are not waited for: {start}"
    assert sum(first[each] for each in first if each not in tables) <= most, first
    assert end.total() <= most + 1, f"loss and norm; weights of sources were there: {end}"
    assert line.total() <= 6, line


def test_norms_by_source_and_held_out_losses_are_those_of_the_cpu(tmp_path):
    stage = STAGES["DAE"]
    on_cpu, _ = trained(stage, tmp_path / "cpu", measured=True)
    with trainers_device() as device:
        lines, _ = trained(stage, tmp_path / "device", device, measured=True)
    assert any("evaluation" in line for line in lines)
    assert all("grad_norm" in mean for mean in lines[0]["sources"].values())
    assert figures(lines) == pytest.approx(figures(on_cpu), rel=1e-4, abs=1e-5)


def test_a_tensor_that_was_left_on_the_cpu_is_found(tmp_path):
    left = mock.patch.object(
        BySource, "on", lambda self, _, dtype: torch.tensor(self.values, dtype=dtype)
    )
    with trainers_device() as device, left, pytest.raises(RuntimeError, match="all tensors to be"):
        trained(STAGES["DAE"], tmp_path / "device", device)


def cache_of(model: Any, folder: Path) -> CachedTeacher:
    """A cache of the rows, written by a model where it is."""
    settings, rows = CacheSettings(), [*ROWS["a"], *ROWS["b"]]
    known = {"teacher": "t", "revision": None, "weights": "w", "tokenizer": "k"}
    identity = Identity(**known, vocabulary=VOCABULARY, temperature=1.0, scheme=settings.identity)
    stats = measure_token_stats(model, rows, VOCABULARY, settings, temperature=1.0)
    create(folder, identity, stats, {})
    cache = Cache(folder, identity, remedy="run it again")
    with ShardWriter(folder, owner=cache.owner) as writer:
        made = entries(model, rows, cache.vocabulary, settings, temperature=1.0, owner=cache.owner)
        writer.add(made)
    return CachedTeacher(cache)


def test_a_cache_is_written_and_read(tmp_path):
    stage, model = Stage([BOTH, BOTH], 1), frozen("mistral")
    batch = collate([(0, row) for row in ROWS["a"]])
    kept = cache_of(model, tmp_path / "one").signal(batch).parts[0].target
    with trainers_device() as device:
        there = to_cuda(frozen("mistral"))
        teacher = cache_of(there, tmp_path / "cache")
        target = teacher.signal(batch.to("cuda:0")).parts[0].target
        assert target.ids.tolist() == kept.ids.tolist()
        logits = torch.cat(list(tiles_of_logits(there, batch.to("cuda:0"), VOCABULARY, 1.0)))
        assert fidelity(target, logits).entries > 1
        device.take()
        lines, counted = trained(stage, tmp_path / "device", device, teacher=teacher)
    check_waits(counted, 1)
    on_cpu, _ = trained(stage, tmp_path / "cpu", teacher=teacher)
    assert figures(lines) == pytest.approx(figures(on_cpu), rel=1e-4, abs=1e-5)


def answering(tokenizer: Any, seed: int) -> Any:
    """A model whose answers vary."""
    model = tiny_model(
        seed=seed,
        dtype=torch.float64,
        vocab_size=len(tokenizer),
        num_hidden_layers=1,
        initializer_range=0.6,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return model.eval()


def test_scores_and_answers_are_those_of_the_cpu():
    tokenizer = word_tokenizer()
    rows = [
        Conversation(
            [{"role": "user", "content": said}, {"role": "assistant", "content": "red"}],
            where="d.jsonl:1",
            fields={"options": ["red", "blue 1"]},
        )
        for said in ("copy red", "copy blue 1 2", "add 4 5")
    ]
    asked = questions(tokenizer, rows)

    def found(model: Any, base: Any) -> dict[str, Any]:
        samplings = [Sampling(max_new_tokens=4, temperature=t, top_p=0.9, seed=3) for t in (0, 1)]
        requests = [GenerationRequest(messages=rows[0].messages[:1], sampling=s) for s in samplings]
        texts: list[str] = []
        generator = LocalGenerator(lambda: (model, tokenizer), batch=2)
        generator.generate(
            requests[:1], lambda *_: None, on_text=lambda _, text: texts.append(text)
        )
        return {
            "answers": generate_outputs(model, tokenizer, asked, max_new_tokens=4, batch=2),
            "sampled": generate_all(generator, requests),
            "streamed": texts,
            "choice": choice(model, tokenizer, asked, batch=4).items,
            **{n: score(model, base, asked, batch=2).items for n, score in LIKENESSES.items()},
        }

    by_model = {name for name, metric in METRICS.items() if metric.score is None}
    assert by_model == {"choice", "lm_eval", *LIKENESSES}, "the others read answers"
    on_cpu = found(answering(tokenizer, 1), answering(tokenizer, 2))
    with simulated_cuda():
        there = found(*(to_cuda(answering(tokenizer, seed)) for seed in (1, 2)))
    assert there == on_cpu


def test_models_are_checked_and_changed_where_they_are(monkeypatch):
    mapped = torch.arange(VOCABULARY).flip(0)
    upcycle = Upcycle(model="m", experts=2, gate="hidden_states", source="s", tokens=40)
    weights: Any = {f"{name}": tensor for name, tensor in frozen("mistral").state_dict().items()}
    config = tiny_config("mistral", num_hidden_layers=1)
    gates = router_init.drawn_gates(upcycle, config, weights, ROWS["a"])
    with simulated_cuda():
        model = to_cuda(frozen("gemma2"))
        check_head(model, where="here")
        model = to_cuda(frozen("mistral"))
        before = model.lm_head.weight.tolist()
        reorder_vocabulary(model, mapped)
        assert model.lm_head.weight.tolist() == before[::-1]
        monkeypatch.setattr(router_init, "_device", lambda: CUDA)
        there = router_init.drawn_gates(upcycle, config, weights, ROWS["a"])
    torch.testing.assert_close(there[0], gates[0])
