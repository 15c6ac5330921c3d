"""Wherever a teacher's weights lie, the student's gradient is the same; rounded ones come near."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import MistralConfig, MistralForCausalLM, MixtralConfig, MixtralForCausalLM

from dominie.data.batch import Batch, collate
from dominie.data.tokenization import Encoded
from dominie.losses.objective import Objective
from dominie.losses.terms import Attention, LossTerms, NextToken, Prediction
from dominie.models.loading import load_frozen
from dominie.models.spec import Model
from dominie.teachers import LocalTeacher, RoutedTeacher
from dominie.training.loss_forward import DistillationInputs, loss_in_forward

SIZES = {
    "vocab_size": 96,
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.04,
    "sliding_window": None,
}
ROUTES = ["mixture", "dense", None]
TERMS = [
    LossTerms(prediction=Prediction(), attention=Attention()),
    LossTerms(prediction=Prediction()),
    LossTerms(next_token=NextToken()),
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """A mixture of experts and a dense model."""
    folder = tmp_path_factory.mktemp("teachers")
    torch.manual_seed(0)
    mixture = MixtralForCausalLM(MixtralConfig(**SIZES, num_local_experts=4))
    dense = MistralForCausalLM(MistralConfig(**SIZES))
    for name, model in (("mixture", mixture), ("dense", dense)):
        model.save_pretrained(folder / name)
    return {name: folder / name for name in ("mixture", "dense")}


@pytest.fixture(scope="module")
def batch() -> Batch:
    """Rows of every source, packed."""
    generator = torch.Generator().manual_seed(1)
    rows = []
    for source in (0, 1, 2, 0, 1):
        ids = torch.randint(96, (12 + source,), generator=generator).tolist()
        rows.append((source, Encoded(ids, [False] + [True] * (len(ids) - 1))))
    return collate(rows, routes=[0, 1, 2], pack_to=30)


def taught(folders: dict[str, Path], placement: str | None) -> RoutedTeacher:
    models = {n: load_frozen(Model(path=str(p), placement=placement)) for n, p in folders.items()}
    layers = {"mixture": [0, 1], "dense": ()}  # attention is compared on one source
    teachers = {n: LocalTeacher(m, attention_layers=layers[n]) for n, m in models.items()}
    return RoutedTeacher(teachers, ROUTES)


def gradient(teacher: RoutedTeacher, batch: Batch) -> torch.Tensor:
    """Of a student that learns predictions and attention, each source from its own teacher."""
    torch.manual_seed(2)
    student = MistralForCausalLM(MistralConfig(**SIZES))
    with loss_in_forward(student, Objective(TERMS), [(0, 0), (1, 1)]):
        student(inputs=DistillationInputs(batch, teacher.signal(batch)))["loss"].backward()
    return torch.cat([p.grad.flatten() for p in student.parameters()])


@pytest.mark.parametrize("placement", ["cpu", "sharded", "cached"])
def test_the_gradient_is_that_of_a_teacher_on_the_device(folders, batch, placement):
    """Alone, one that would be shared out is whole; one that would be cached speaks itself."""
    expected = gradient(taught(folders, None), batch)
    assert expected.norm() > 1e-2
    torch.testing.assert_close(gradient(taught(folders, placement), batch), expected)


@pytest.mark.parametrize(
    ("placement", "package", "error", "share"),
    [("8bit", "torchao", 0.01, 0.30), ("4bit", "bitsandbytes", 0.12, 0.18)],
)
def test_rounded_weights_come_near_it_and_are_small(
    folders, batch, placement, package, error, share
):
    pytest.importorskip(package)
    plain, rounded = (taught(folders, each) for each in (None, placement))
    for name in folders:
        sizes = [_bytes(teacher.teachers[name].model.model.layers) for teacher in (plain, rounded)]
        assert sizes[1] < share * sizes[0], f"{name}: experts and linear layers alike"
    expected, found = (gradient(teacher, batch) for teacher in (plain, rounded))
    apart = float((found - expected).norm() / expected.norm())
    assert 0 < apart < error


def _bytes(layers: torch.nn.Module) -> int:
    """Of all storages that the layers hold."""
    held = {}
    for tensor in (*layers.parameters(), *layers.buffers()):
        parts = [getattr(tensor, n) for n in ("qdata", "scale") if hasattr(tensor, n)]
        for part in parts or [tensor]:
            held[part.untyped_storage().data_ptr()] = part.untyped_storage().nbytes()
    return sum(held.values())
