"""What hooks into attention lean on in transformers: looked up anew at every release."""

from __future__ import annotations

import inspect
import re
import sys
from pathlib import Path

import pytest
import torch
import transformers
from tiny import FAMILIES, tiny_model
from transformers.configuration_utils import ALLOWED_LAYER_TYPES
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, AttentionInterface

from dominie.core.errors import InputError
from dominie.models import attention_hooks
from dominie.models.attention_hooks import attach_hook, check_attention, detach_hook, hooks_of
from dominie.models.info import info_of

#: Kinds of layers that are no plain softmax over the keys before a row, and are refused.
NOT_SOFTMAX = {
    "chunked_attention",
    "compressed_sparse_attention",
    "conv",
    "dense",
    "heavily_compressed_attention",
    "indexed_attention",
    "linear_attention",
    "minimax_m3_sparse",
    "moe",
    "reference_sliding_attention",
    "sparse",
    "window_attention",
}
#: Attention classes of causal language models that are not found by their name, and so refused.
UNNAMED = {"LongcatFlashMLA"}


class Noted:
    """A hook that notes the layers that it was called for."""

    def __init__(self) -> None:
        self.layers: list[int] = []

    def on_attention(self, layer: int, projections: object) -> None:
        self.layers.append(layer)


def test_every_kind_of_layer_is_known():
    assert set(ALLOWED_LAYER_TYPES) == attention_hooks._SOFTMAX_LAYERS | NOT_SOFTMAX
    assert not attention_hooks._SOFTMAX_LAYERS & NOT_SOFTMAX


@pytest.mark.parametrize(("stock", "hooked"), attention_hooks._NAMES.items())
def test_stock_implementations_and_ours_have_functions_and_masks(stock, hooked):
    if stock != "eager":  # which every model file has for itself
        assert stock in ALL_ATTENTION_FUNCTIONS
    assert stock in ALL_MASK_ATTENTION_FUNCTIONS
    assert "flash" not in hooked, "transformers imports a package for names with flash in them"
    assert callable(AttentionInterface()[hooked])
    assert AttentionMaskInterface()[hooked] is ALL_MASK_ATTENTION_FUNCTIONS[stock]


def test_attention_classes_are_found_by_their_name():
    """Whatever calls the interface in a causal language model is called …Attention…."""
    found, unnamed = 0, set()
    for path in sorted(Path(transformers.__file__).parent.glob("models/*/modeling_*.py")):
        text = path.read_text(encoding="utf-8")
        if "ForCausalLM" not in text or "ALL_ATTENTION_FUNCTIONS" not in text:
            continue
        found += 1
        for part in re.split(r"^(?=class |def |@)", text, flags=re.MULTILINE):
            name = re.match(r"class (\w+)", part)
            if name and "ALL_ATTENTION_FUNCTIONS" in part and "Attention" not in name[1]:
                unnamed.add(name[1])
    assert found > 100
    assert unnamed == UNNAMED


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_s_modules_have_what_is_read_off_them(family):
    model = tiny_model(family)
    modules = attention_hooks._attention_modules(model)
    assert sorted(modules) == [0, 1]
    for layer, module in modules.items():
        assert module.layer_idx == layer
        assert isinstance(module.scaling, float)
        assert module.is_causal
        source = vars(sys.modules[type(module).__module__])
        assert "ALL_ATTENTION_FUNCTIONS" in source
        arguments = list(inspect.signature(source["eager_attention_forward"]).parameters)
        assert arguments[:5] == ["module", "query", "key", "value", "attention_mask"]


def test_the_settings_that_refuse_a_family_are_still_called_so():
    from transformers import Gemma2Config, GptOssConfig
    from transformers.models.gpt_oss.modeling_gpt_oss import GptOssAttention

    assert Gemma2Config().attn_logit_softcapping
    with torch.device("meta"):
        module = GptOssAttention(GptOssConfig(), layer_idx=0)
    assert any("sink" in name for name, _ in module.named_parameters())
    assert "index_topk" in inspect.signature(transformers.DeepseekV32Config.__init__).parameters
    assert transformers.DogeConfig.model_type in attention_hooks._NOT_SOFTMAX


def test_hooks_come_and_go_and_leave_the_stock_attention_behind():
    model, hook = tiny_model("mistral"), Noted()
    stock = model.config._attn_implementation
    ids = torch.arange(6)[None]
    before = model(input_ids=ids).logits
    attach_hook(model, [1], hook)
    assert hooks_of(model) == [hook]
    torch.testing.assert_close(model(input_ids=ids).logits, before, rtol=0, atol=0)
    assert hook.layers == [1]
    detach_hook(model, hook)
    assert hooks_of(model) == []
    assert model.config._attn_implementation == stock
    model(input_ids=ids)
    assert hook.layers == [1]


def test_a_layer_that_cannot_be_compared_is_refused_before_weights_are_loaded():
    check_attention(info_of(tiny_model("mistral").config), [0, 1])
    with pytest.raises(InputError, match="it has no attention layer 7"):
        check_attention(info_of(tiny_model("mistral").config), [7])
    with pytest.raises(InputError, match="soft-capped"):
        check_attention(info_of(tiny_model("gemma2").config), [0])
