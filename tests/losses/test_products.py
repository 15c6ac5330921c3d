"""The GPU's way through the vocabulary losses, on a CPU: what is multiplied, written, rounded."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from dominie.losses import heads, tiles

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SIZES = (37, 41)


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """16-bit products with float32 results, which a CPU lacks, and several tiles."""
    monkeypatch.setattr(tiles, "tile_elements", lambda device: 16 * 41)
    if DEVICE == "cuda":
        yield
        return
    monkeypatch.setattr(tiles, "slope_precision", lambda products, device: products)
    monkeypatch.setattr(
        heads, "_keeps_accumulator", lambda operand, out: operand.dtype != out.dtype
    )
    library = torch.library.Library("aten", "IMPL")

    def product(a, b, out_dtype, *, out):
        return out.copy_(a.float() @ b.float())

    def sum_of_products(total, a, b, out_dtype, *, beta=1, alpha=1, out):
        before = beta * total if beta else 0.0  # as cuBLAS: of what is not read, nothing comes
        return out.copy_(before + alpha * (a.float() @ b.float()))

    library.impl("mm.dtype_out", product, "CPU")
    library.impl("addmm.dtype_out", sum_of_products, "CPU")
    yield
    library._destroy()


class Seen(TorchDispatchMode):
    """Counts products, and the operators that write as many elements as the head has."""

    def __init__(self, elements):
        super().__init__()
        self.elements, self.products, self.written = elements, 0, Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        name = function.overloadpacket.__name__
        self.products += name in ("mm", "addmm")
        made = isinstance(result, torch.Tensor) and result.numel() == self.elements
        if made and not function.is_view and not name.startswith("empty"):
            self.written[name] += 1
        return result


def test_values_and_gradients(make_problem, as_on_a_gpu, backend):
    problem = make_problem(sizes=SIZES, dtype=torch.bfloat16, scale=0.4, with_bias=True)
    losses = problem.losses(backend=backend)
    divergence, next_token, leaves = problem.oracle()
    assert_close(losses.total.double(), divergence + next_token, rtol=1e-5, atol=1e-4)
    found = torch.autograd.grad(losses.total / 7, problem.leaves)
    wanted = torch.autograd.grad((divergence + next_token) / 7, leaves)
    for x, y in zip(found, wanted, strict=True):
        assert x.dtype == torch.bfloat16
        assert (x.double() - y).norm() < 0.005 * y.norm()


def test_one_product_a_tile_and_one_pass_at_the_end(make_problem, as_on_a_gpu, backend):
    problem = make_problem(sizes=SIZES, dtype=torch.bfloat16)
    with Seen(problem.weight.numel()) as seen:
        (problem.losses(backend=backend).total / 7).backward()
    assert seen.written == {"addmm": 2, "mul": 1}  # tiles of 12 and 11 tokens
    assert seen.products == 2 * 4  # logits of student and teacher, gradients of states and head


@pytest.mark.parametrize("gigabytes", [16, 24, 80, 180])
def test_tiles_are_a_small_part_of_a_gpu(gigabytes):
    elements = tiles.tile_elements(torch.device("cuda"), gigabytes * 1e9)
    assert elements * 10 <= gigabytes * 1e9 / 10  # logits of two models, a gradient in 16 bits
    assert elements == (2**27 if gigabytes < 64 else 2**28)
