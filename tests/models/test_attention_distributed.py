"""The attention loss on two processes: DDP and FSDP2 reduce the gradients of one process."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny import tiny_model
from torch import Tensor, nn

from dominie.models.attention_capture import AttentionTarget, StudentAttention, TeacherAttention

WORLD = 2
LAYERS = [0, 1, 2]


def mistral(seed: int) -> nn.Module:
    sizes = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4}
    return tiny_model("mistral", seed=seed, num_key_value_heads=2, **sizes)


def batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(64, (4, 12), generator=generator)
    weights = torch.rand(4, 12, generator=generator)
    weights[2:, :6] = 0  # ranks differ in what they supervise
    return ids, weights


def loss_of(
    student: nn.Module, scored: StudentAttention, rows: list[int], *, predict: bool
) -> Tensor:
    """Sum over rows of the attention term and, where asked, something of the logits."""
    ids, weights = batch()
    teacher = mistral(1).requires_grad_(False)
    kept = TeacherAttention(teacher, LAYERS)
    teacher(input_ids=ids[rows], use_cache=False)
    target = AttentionTarget(torch.arange(len(rows)), weights[rows], kept.take())
    scored.expect([target], segment_ids=None, value=True)
    logits = student(input_ids=ids[rows], use_cache=False).logits
    # FSDP2 gathers a layer's parameters when a gradient reaches its output: there must be one
    return scored.take() + logits.square().sum() * (1e-3 if predict else 0.0)


def gradients(kind: str, rank: int, *, predict: bool) -> dict[str, Tensor]:
    """Gradients of the whole batch from the share of ``rank``; of one process for kind alone."""
    student = mistral(0).train()
    scored = StudentAttention(student, [(layer, layer) for layer in LAYERS])
    if kind != "alone":
        student.gradient_checkpointing_enable({"use_reentrant": False})
    wrapped: nn.Module = student
    if kind == "ddp":
        wrapped = nn.parallel.DistributedDataParallel(student)
    elif kind == "fsdp2":
        from torch.distributed.fsdp import fully_shard

        for layer in student.model.layers:
            fully_shard(layer)
        fully_shard(student)
    rows = [0, 1, 2, 3] if kind == "alone" else [2 * rank, 2 * rank + 1]
    for _ in range(2):  # two accumulated forwards: reduced each time, or once
        loss = loss_of(wrapped, scored, rows, predict=predict)
        (loss if kind == "alone" else loss * WORLD).backward()  # both average over ranks
    return {
        name.removeprefix("module."): (
            parameter.grad.full_tensor() if kind == "fsdp2" else parameter.grad
        )
        for name, parameter in wrapped.named_parameters()
        if parameter.grad is not None
    }


@pytest.mark.full
def test_two_processes_have_the_gradients_of_one(tmp_path) -> None:
    paths = [str(Path(__file__).parents[1]), *sys.path]  # tests/tiny.py
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths)}
    processes = [
        subprocess.Popen([sys.executable, __file__, str(rank), str(tmp_path)], env=environment)
        for rank in range(WORLD)
    ]
    assert [process.wait(timeout=240) for process in processes] == [0] * WORLD
    for predict in (True, False):
        expected = gradients("alone", 0, predict=predict)
        learning = {name for name, gradient in expected.items() if gradient.any()}
        for kind, rank in itertools.product(("ddp", "fsdp2"), range(WORLD)):
            found = torch.load(tmp_path / f"{kind}-{predict}-{rank}.pt")
            assert {name for name, gradient in found.items() if gradient.any()} == learning
            for name, gradient in expected.items():
                torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-5)


def main(rank: int, folder: Path) -> None:
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=WORLD
    )
    for kind, predict in itertools.product(("ddp", "fsdp2"), (True, False)):
        found = gradients(kind, rank, predict=predict)
        torch.save(found, folder / f"{kind}-{predict}-{rank}.pt")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
