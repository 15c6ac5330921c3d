"""Packed rows on a GPU: by conversation they are what they are under a mask, and padded."""

from __future__ import annotations

import pytest
import torch
from gradients import ragged_rows
from tiny import tiny_model

from dominie.data.batch import Padding, collate
from dominie.models import packed_attention
from dominie.models.packed_attention import decoder_inputs, use_stock_attention


def states_and_gradients(model, batch, inputs):
    """Hidden states of the real positions, conversation by conversation, and gradients."""
    model.zero_grad()
    hidden = model.get_decoder()(**inputs).last_hidden_state.float()
    spans = sorted(batch.spans, key=lambda span: span.input_ids.tolist())
    states = torch.cat([hidden[s.row, s.start : s.start + s.tokens] for s in spans])
    weights = torch.linspace(-1.0, 1.0, states.numel(), device=states.device).view_as(states)
    (states * weights).sum().backward()
    named = model.named_parameters()
    return states.detach(), {n: p.grad.float() for n, p in named if p.grad is not None}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("window", [None, 6])
@pytest.mark.parametrize("key_heads", [4, 2])
def test_packed_rows_are_those_of_a_mask_and_of_padding(
    dtype, window, key_heads, device, monkeypatch
):
    calls = []
    one_call = packed_attention._in_one_call
    monkeypatch.setattr(packed_attention, "_LEAST", 0)
    monkeypatch.setattr(
        packed_attention, "_in_one_call", lambda *given: calls.append(1) or one_call(*given)
    )
    sizes = {"hidden_size": 64, "head_dim": 16, "num_attention_heads": 4, "initializer_range": 0.15}
    model = tiny_model(
        "mistral", dtype=dtype, sliding_window=window, num_key_value_heads=key_heads, **sizes
    ).to(device)
    rows = [(0, row) for row in ragged_rows(12)]
    packed = collate(rows, pack_to=48, padding=Padding.on(device, 64)).to(device)
    padded = collate(rows).to(device)
    inputs = decoder_inputs(model, packed)
    assert "attention_mask" in inputs
    found = states_and_gradients(model, packed, inputs)
    assert bool(calls) == (device.type == "cuda" and dtype == torch.bfloat16)
    use_stock_attention(model)
    masked = states_and_gradients(model, packed, packed.model_inputs())
    alone = states_and_gradients(model, padded, padded.model_inputs())
    tolerance = 4e-2 if dtype == torch.bfloat16 else 1e-3
    for states, gradients in (masked, alone):
        assert (found[0] - states).norm() <= tolerance * states.norm()
        whole = torch.cat([each.flatten() for each in gradients.values()]).norm()
        for name, gradient in gradients.items():
            away = (found[1][name] - gradient).norm()
            assert away <= tolerance * (gradient.norm() + 0.02 * whole), name
