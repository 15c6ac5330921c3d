"""Liger's layers in a student give the gradient of the stock ones, attention distilled and all."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from gradients import ragged_rows
from tiny import tiny_model
from transformers.models.mixtral import modeling_mixtral

from dominie.losses.terms import Attention, LossTerms, Prediction
from dominie.models.attention_capture import StudentAttention
from dominie.teachers import LocalTeacher
from dominie.training.loss_forward import fused_layers

pytestmark = pytest.mark.full


@pytest.fixture
def interpreted(monkeypatch):
    """Liger under Triton's interpreter, which knows neither scalars as tensors nor libdevice."""
    pytest.importorskip("liger_kernel", reason="pip install 'dominie[fused]'")
    if torch.cuda.is_available():
        return
    import triton.language as tl
    from liger_kernel.ops import rms_norm
    from triton.runtime import interpreter

    stock = interpreter._implicit_cvt

    def converted(argument):
        if not isinstance(argument, float):
            return stock(argument)
        handle = interpreter.TensorHandle(np.array([argument], np.float32), tl.float32)
        return tl.tensor(handle, tl.float32)

    monkeypatch.setattr(interpreter, "_implicit_cvt", converted)
    monkeypatch.setattr(rms_norm, "rsqrt", lambda x: tl.rsqrt(x))


def llama(seed: int) -> Any:
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    return tiny_model("llama", seed=seed, initializer_range=0.2, **heads)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_gradient_is_that_of_the_stock_layers(
    interpreted, step_gradient, checkpointing, monkeypatch
):
    seen = []
    stock = StudentAttention.on_attention

    def looked_at(self, layer, projections):
        seen.append((projections.query.detach().clone(), projections.key.detach().clone()))
        stock(self, layer, projections)

    monkeypatch.setattr(StudentAttention, "on_attention", looked_at)
    terms = [LossTerms(prediction=Prediction(), attention=Attention(weight=0.5))]

    def taken(fused: bool):
        seen.clear()
        teacher = LocalTeacher(llama(2).eval().requires_grad_(False), attention_layers=[0, 1])
        gradient = step_gradient(
            llama(1),
            [ragged_rows(4)],
            terms,
            teacher=teacher,
            micro_batch=4,
            pack_to=32,
            pairs=[(0, 0), (1, 1)],
            gradient_checkpointing=checkpointing,
            use_liger_kernel=fused,
        )
        return gradient, list(seen)

    (expected, stock_seen), (found, fused_seen) = taken(False), taken(True)
    assert len(stock_seen) == len(fused_seen) == (4 if checkpointing else 2)
    for one, other in zip(stock_seen, fused_seen, strict=True):
        torch.testing.assert_close(other, one, rtol=1e-4, atol=1e-5)
    assert found.keys() == expected.keys()
    assert any(not torch.equal(found[name], expected[name]) for name in found), "not the same code"
    for name, gradient in expected.items():
        torch.testing.assert_close(
            found[name], gradient, rtol=1e-4, atol=1e-5 * float(gradient.abs().max())
        )


def test_frozen_models_get_the_same_layers_and_say_the_same(interpreted):
    """But adapters over the student's base, and models whose layers something else has replaced."""
    student, hooked = llama(1), llama(3)
    plain = hooked.model.norm.forward
    hooked.model.norm.forward = plain
    teacher = tiny_model("mixtral", seed=2, initializer_range=0.2).eval().requires_grad_(False)
    ids = torch.arange(12).view(2, 6)
    with torch.no_grad():
        expected = teacher(ids).logits
        arguments = SimpleNamespace(use_liger_kernel=True, liger_kernel_config=None)
        before = modeling_mixtral.apply_rotary_pos_emb
        with fused_layers(student, arguments, [teacher, student, hooked]):
            found = teacher(ids).logits
            assert modeling_mixtral.apply_rotary_pos_emb is not before
            assert all("forward" in vars(layer.input_layernorm) for layer in teacher.model.layers)
            assert "forward" not in vars(student.model.norm), "its trainer's to give"
            assert hooked.model.norm.forward is plain
    assert modeling_mixtral.apply_rotary_pos_emb is before
    assert not torch.equal(found, expected)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
