"""Attention over packed rows against the dense mask that transformers derives from positions."""

from __future__ import annotations

import inspect
import itertools
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tiny import FAMILIES, tiny_model
from torch.nn.attention import varlen
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from dominie.data.batch import collate
from dominie.data.tokenization import Encoded
from dominie.models import packed_attention
from dominie.models.attention_capture import TeacherAttention
from dominie.models.packed_attention import PACKED, decoder_inputs, use_stock_attention

LENGTHS = [5, 17, 3, 9, 12, 1, 22, 8, 2]


@pytest.fixture(autouse=True)
def _short_rows_too(monkeypatch):
    monkeypatch.setattr(packed_attention, "_LEAST", 0)


def conversations(lengths=LENGTHS, seed=0):
    rng = np.random.default_rng(seed)
    return [(0, Encoded(rng.integers(0, 61, n).tolist(), [True] * n)) for n in lengths]


def hidden_and_gradients(model, inputs):
    model.zero_grad()
    hidden = model.get_decoder()(**inputs).last_hidden_state
    (hidden * torch.linspace(0.5, 1.5, hidden.shape[-1])).square().sum().backward()
    return hidden.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def assert_as_under_a_mask(model, batch, tolerance):
    """Compare in forward and backward, real positions and padding alike."""
    inputs = decoder_inputs(model, batch)
    assert inputs["attention_mask"].numel() == len(batch.segment_lengths), "no dense mask"
    found, gradients = hidden_and_gradients(model, inputs)
    use_stock_attention(model)
    expected, expected_gradients = hidden_and_gradients(model, batch.model_inputs())
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)
    assert gradients.keys() == expected_gradients.keys()
    sizes = {name: float(each.abs().max()) for name, each in expected_gradients.items()}
    for name, gradient in gradients.items():
        scale = sizes[name] + 1e-3 * max(sizes.values())  # some are zero but for rounding
        torch.testing.assert_close(
            gradient, expected_gradients[name], rtol=0, atol=tolerance * scale
        )


@pytest.mark.parametrize("pack_to", [22, 30, 79])
@pytest.mark.parametrize("window", [None, 1, 4, 21])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_rows_are_attended_by_conversation(pack_to, window, dtype, monkeypatch):
    monkeypatch.setattr(packed_attention, "_WINDOW_BLOCK", 3)  # several blocks to a conversation
    model = tiny_model(
        "mistral", dtype=dtype, sliding_window=window, num_attention_heads=4, num_key_value_heads=2
    )
    batch = collate(conversations(), pack_to=pack_to)
    assert_as_under_a_mask(model, batch, 1e-10 if dtype == torch.float64 else 1e-4)


WINDOWED = {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}
KINDS = {
    "llama": {},
    "qwen2": WINDOWED,  # on the second layer alone
    "qwen3": WINDOWED,
    "mixtral": {"sliding_window": 6},
    "gemma3_text": {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]},
    "cohere2": {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]},
    "gpt2": {},
    "gpt_neox": {},
    "deepseek_v3": {
        "qk_rope_head_dim": 4,
        "qk_nope_head_dim": 8,
        "v_head_dim": 8,  # narrower than queries
        "num_key_value_heads": 2,
    },
    "phi3": {"sliding_window": 5, "pad_token_id": 0},
    "smollm3": {"sliding_window": 4, "use_sliding_window": True, "pad_token_id": 0},
    "olmo3": {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]},
}


def of_family(family, **changes):
    FAMILIES.setdefault(family, {})
    model = tiny_model(family, experts_implementation="eager", **KINDS[family] | changes)
    return model.double().eval()  # no dropout


@pytest.mark.parametrize("family", KINDS)
def test_families_attend_as_under_their_own_masks(family):
    batch = collate(conversations(), pack_to=30)
    assert_as_under_a_mask(of_family(family), batch, 1e-4)  # norms and rotations in float32


def test_each_conversation_gets_what_it_gets_in_a_row_of_its_own():
    model = tiny_model(dtype=torch.float64)
    rows = conversations()
    batch = collate(rows, pack_to=40)
    hidden = model.get_decoder()(**decoder_inputs(model, batch)).last_hidden_state
    for span in batch.spans:
        alone = model.get_decoder()(torch.from_numpy(span.input_ids.astype(np.int64))[None])
        place = hidden[span.row, span.start : span.start + span.tokens]
        torch.testing.assert_close(place, alone.last_hidden_state[0], rtol=1e-12, atol=1e-12)


def test_short_rows_and_single_conversations_keep_the_stock_path(monkeypatch):
    model = tiny_model()
    single = collate(conversations())
    assert "attention_mask" not in decoder_inputs(model, single)
    monkeypatch.undo()
    assert "attention_mask" not in decoder_inputs(model, collate(conversations(), pack_to=79))
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("llama", {"attn_implementation": "eager"}),
        ("gemma2", {}),  # soft-capped scores: eager
        ("qwen3_next", {"layer_types": ["linear_attention", "full_attention"]}),
        ("llama", {"use_bidirectional_attention": True}),
    ],
)
def test_models_that_do_not_attend_so_keep_their_own_masks(family, changes):
    FAMILIES.setdefault(family, {})
    model = tiny_model(family, **changes)
    stock = model.config._attn_implementation
    assert "attention_mask" not in decoder_inputs(model, collate(conversations(), pack_to=30))
    assert model.config._attn_implementation == stock


def test_the_same_model_still_reads_padding_and_generates():
    """Other masks than lengths go to the stock function, under the same name."""
    model = tiny_model().eval()
    ids = torch.randint(0, 61, (2, 7), generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1] * 7])
    asked = {"attention_mask": mask, "do_sample": False, "max_new_tokens": 5, "pad_token_id": 0}
    expected = model.generate(ids, **asked)
    decoder_inputs(model, collate(conversations(), pack_to=30))
    assert model.config._attn_implementation == PACKED
    assert torch.equal(model.generate(ids, **asked), expected)
    use_stock_attention(model)
    assert model.config._attn_implementation == "sdpa"


def test_hooks_come_before_or_after_and_leave_what_was_there():
    batch, kept = collate(conversations(), pack_to=30), []
    for hooked_first in (True, False):
        model = tiny_model(dtype=torch.float64)
        hook = TeacherAttention(model, [0, 1]) if hooked_first else None
        inputs = decoder_inputs(model, batch)
        hook = hook or TeacherAttention(model, [0, 1])
        assert model.config._attn_implementation == "dominie_over_packed"
        model.get_decoder()(**inputs)
        kept.append(hook.take())
        if hooked_first:
            use_stock_attention(model)
            assert model.config._attn_implementation == "dominie_over_sdpa"
            hook.detach()
        else:
            hook.detach()
            assert model.config._attn_implementation == PACKED
            use_stock_attention(model)
        assert model.config._attn_implementation == "sdpa"
    for layer, projections in kept[0].items():
        assert torch.equal(projections.query, kept[1][layer].query)


def test_a_layer_recomputed_in_backward_attends_by_the_same_lengths():
    model = tiny_model(dtype=torch.float64)
    batch = collate(conversations(), pack_to=30)
    expected = hidden_and_gradients(model, batch.model_inputs())[1]
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    found = hidden_and_gradients(model, decoder_inputs(model, batch))[1]
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-9, atol=1e-9)


# One call for all: `varlen_attn` itself needs a GPU. Here its arguments are read as it reads them.


def as_varlen_attn(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale, window_size):
    """torch 2.11's function: segment by segment, keys from i − left to i + right."""
    assert query.dtype in (torch.float16, torch.bfloat16)
    assert (query.stride(-1), cu_seq_q.dtype) == (1, torch.int32)
    assert torch.equal(cu_seq_q, cu_seq_k)
    bounds = cu_seq_q.tolist()
    assert bounds[0] == 0
    assert bounds[-1] == len(query)
    assert max(b - a for a, b in itertools.pairwise(bounds)) == max_q == max_k
    left, right = window_size
    assert right == 0
    parts = []
    for start, stop in itertools.pairwise(bounds):
        i = torch.arange(stop - start)
        seen = i[None] <= i[:, None]
        if left >= 0:
            seen &= i[None] >= i[:, None] - left
        q, k, v = (each[start:stop].transpose(0, 1)[None] for each in (query, key, value))
        more = {"scale": scale, "enable_gqa": True, "attn_mask": seen}
        parts.append(torch.nn.functional.scaled_dot_product_attention(q, k, v, **more)[0])
    return torch.cat(parts, 1).transpose(0, 1)


def as_in_2_13(*arguments, enable_gqa=False, **more):
    assert enable_gqa == (arguments[0].shape[1] != arguments[1].shape[1])
    return as_varlen_attn(*arguments, **more)


@pytest.mark.parametrize("version", [as_varlen_attn, as_in_2_13])
@pytest.mark.parametrize("key_heads", [4, 2])
@pytest.mark.parametrize(("window", "value_width"), [(None, 8), (4, 8), (30, 8), (None, 5)])
def test_one_call_serves_all_conversations(version, key_heads, window, value_width, monkeypatch):
    monkeypatch.setattr(varlen, "varlen_attn", version)
    generator, positions = torch.Generator().manual_seed(0), 30

    def drawn(heads, width):
        drawn = torch.randn(3, positions, heads, width, generator=generator)
        return drawn.transpose(1, 2).bfloat16().requires_grad_()

    query, key, value = drawn(4, 8), drawn(key_heads, 8), drawn(key_heads, value_width)
    lengths = [7, 20, 3, 30, 1, 29]
    module = SimpleNamespace(num_key_value_groups=4 // key_heads, is_causal=True)
    options = {"sliding_window": window, "scaling": 0.4}
    mask = torch.tensor(lengths, dtype=torch.int32)[None, None, None]
    attend = ALL_ATTENTION_FUNCTIONS[PACKED]
    expected = attend(module, query, key, value, mask, **options)[0]
    monkeypatch.setattr(packed_attention, "_one_call_serves", lambda *_: True)
    found = attend(module, query, key, value, mask, **options)[0]
    assert found.shape == (3, positions, 4, value_width)
    torch.testing.assert_close(found, expected, rtol=2e-2, atol=2e-2)
    for one, other in zip(
        torch.autograd.grad(found.float().square().sum(), (query, key, value)),
        torch.autograd.grad(expected.float().square().sum(), (query, key, value)),
        strict=True,
    ):
        torch.testing.assert_close(one, other, rtol=5e-2, atol=5e-2)


def test_one_call_is_made_of_arguments_that_this_torch_has():
    known = inspect.signature(varlen.varlen_attn).parameters
    assert {"scale", "window_size"} <= set(known)
    assert list(known)[:7] == list(inspect.signature(as_varlen_attn).parameters)[:7]
