"""A mixture's experts under autocast: in its precision, close to fp32, and trained."""

from __future__ import annotations

import pytest
import torch
from tiny import tiny_model
from torch.utils._python_dispatch import TorchDispatchMode

from dominie.models.moe import follow_autocast

SIZES = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "initializer_range": 0.02}


class GroupedProducts(TorchDispatchMode):
    """Notes the dtypes of grouped products."""

    def __init__(self):
        super().__init__()
        self.dtypes = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._grouped_mm.default:
            self.dtypes |= {args[0].dtype, args[1].dtype}
        return func(*args, **(kwargs or {}))


@pytest.fixture
def mixture():
    model = tiny_model("mixtral", num_local_experts=2, **SIZES)
    if model.config._experts_implementation != "grouped_mm":
        pytest.skip("this torch has no grouped products")
    return model


def test_experts_run_in_the_precision_of_the_run_and_learn(mixture):
    ids = torch.randint(64, (2, 16))
    exact = mixture(ids).logits
    follow_autocast(mixture)
    assert torch.equal(mixture(ids).logits, exact), "without autocast nothing changes"
    seen = GroupedProducts()
    with torch.autocast("cpu", torch.bfloat16), seen:
        logits = mixture(ids).logits
    assert seen.dtypes == {torch.bfloat16}
    assert (logits.float() - exact).norm() < 0.03 * exact.norm()
    logits.float().square().sum().backward()
    gradient = mixture.model.layers[0].mlp.experts.gate_up_proj.grad
    assert gradient.dtype == torch.float32
    assert gradient.norm() > 0


def test_a_model_without_experts_is_left_alone():
    model = tiny_model("mistral")
    before = model.config._experts_implementation
    follow_autocast(model)
    assert model.config._experts_implementation == before
