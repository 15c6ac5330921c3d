"""Batches differ in shape, and kernels are compiled a few times all the same."""

import inspect
from importlib.util import find_spec

import pytest
import torch

from dominie.losses import Head, vocabulary_losses
from dominie.losses.attention_rows import Projections, Visibility

if find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)

from dominie.losses import triton_attention as attention
from dominie.losses import triton_vocabulary as vocabulary

SHAPES = [(1, 16), (1, 17), (2, 64), (3, 100), (2, 333), (5, 128), (7, 481), (4, 512), (1, 777)]


class Recorder:
    """In place of a kernel: notes what Triton would compile it for, and does not run it."""

    def __init__(self, kernel):
        self.signature = inspect.signature(kernel.fn)
        self.variants = set()

    def __getitem__(self, _grid):
        return self.launch

    def launch(self, *args, **named):
        """Triton compiles for dtypes, alignment of pointers, divisors of integers, constants."""
        options = {k: named.pop(k) for k in ("num_warps", "num_stages") if k in named}
        bound = self.signature.bind(*args, **named).arguments
        kinds = {name: name.isupper() and value for name, value in bound.items()}
        for name, value in bound.items():
            if isinstance(value, torch.Tensor):
                kinds[name] = value.dtype, value.data_ptr() % 16 == 0
            elif isinstance(value, int) and not name.isupper():
                kinds[name] = value == 1 or (value % 16 == 0, value.bit_length() > 32)
        self.variants.add((*kinds.items(), *options.items()))


@pytest.fixture
def recorded(monkeypatch):
    """Stands a recorder in for a kernel of a module."""

    def put(module, name) -> Recorder:
        recorder = Recorder(getattr(module, name))
        monkeypatch.setattr(module, name, recorder)
        return recorder

    return put


def projections(batch: int, heads: int, length: int) -> Projections:
    """As transformers leaves them: a view of [B, L, heads · d]."""
    query, key = (torch.zeros(batch, length, h, 32).transpose(1, 2) for h in (heads, 2))
    return Projections(query, key, 32**-0.5)


@pytest.mark.parametrize("packed", [False, True])
def test_attention_is_compiled_for_two_kinds_of_length(recorded, packed):
    names = ("statistics", "query_gradient", "key_gradient")
    kernels = {name: recorded(attention, name) for name in names}
    for batch, length in SHAPES:
        segments = torch.arange(length).expand(batch, -1) // 50 if packed else None
        visible = Visibility(torch.ones(batch, length), segments)
        student, teacher = projections(batch, 4, length), projections(batch, 8, length)
        attention.value(student, teacher, visible)
        attention.gradients(student, teacher, visible, torch.ones(()))
    counts = {name: len(kernel.variants) for name, kernel in kernels.items()}
    assert counts == {"statistics": 4, "query_gradient": 2, "key_gradient": 2}  # value, gradient


def test_the_vocabulary_losses_are_compiled_once(recorded):
    kernel = recorded(vocabulary, "_score_token")
    head, teacher = torch.zeros(300, 8, requires_grad=True), torch.zeros(300, 16)
    for batch, length in SHAPES:
        tokens = batch * length - 3
        vocabulary_losses(
            torch.zeros(tokens, 8, requires_grad=True),
            Head(head),
            (torch.zeros(tokens, 16), Head(teacher)),
            labels=torch.zeros(tokens, dtype=torch.long),
            backend="triton",
        )
    assert len(kernel.variants) == 1
