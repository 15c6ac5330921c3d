"""Fused layers: who may have them, that no loss comes along, that a family's code comes back."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
from tiny import tiny_model
from transformers.models.llama import modeling_llama

from dominie.core.errors import InputError
from dominie.models.info import info_of
from dominie.training.loss_forward import check_fused_layers, fused_layers

ON = {"use_liger_kernel": True}


def to_llama(rope=True, swiglu=True, fused_linear_cross_entropy=True, model=None):
    modeling_llama.apply_rotary_pos_emb = to_llama


@pytest.fixture
def liger(monkeypatch):
    """A library that has layers for two families, interpreted."""
    for name in ("liger_kernel", "liger_kernel.transformers"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    library = ModuleType("liger_kernel.transformers.monkey_patch")
    library.MODEL_TYPE_TO_APPLY_LIGER_FN = {"llama": to_llama, "mixtral": to_llama}
    monkeypatch.setitem(sys.modules, library.__name__, library)
    monkeypatch.setenv("TRITON_INTERPRET", "1")


def refused(arguments, family="llama"):
    student = info_of(tiny_model(family).config, name="small")
    with pytest.raises(InputError) as error:
        check_fused_layers(arguments, student, where="stages.kd.train")
    return error.value


def test_without_the_library_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "liger_kernel", None)
    error = refused(ON)
    assert error.where == "stages.kd.train.use_liger_kernel"
    assert "dominie[fused]" in error.do


def test_a_family_without_fused_layers_is_named(liger):
    error = refused(ON, "qwen3")
    assert (error.expected, error.found) == ("llama, mixtral", "qwen3, of small")


@pytest.mark.parametrize(
    ("family", "layer", "allowed"),
    [
        ("llama", "geglu", "rope, swiglu"),
        ("llama", "fused_linear_cross_entropy", "rope, swiglu"),
        ("mixtral", "swiglu", "rope"),  # experts
    ],
)
def test_losses_experts_and_unknown_layers_are_refused(liger, family, layer, allowed):
    error = refused(ON | {"liger_kernel_config": {layer: True}}, family)
    assert error.where == f"stages.kd.train.liger_kernel_config.{layer}"
    assert error.expected == allowed


def test_a_configuration_of_nothing_and_a_machine_without_a_gpu_are_refused(liger, monkeypatch):
    unused = refused({"liger_kernel_config": {"rope": True}})
    assert unused.where == "stages.kd.train.liger_kernel_config"
    monkeypatch.delenv("TRITON_INTERPRET")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "GPU" in str(refused(ON))


@pytest.mark.parametrize(("family", "off"), [("llama", set()), ("mixtral", {"swiglu"})])
def test_no_loss_comes_along_and_the_code_of_the_family_comes_back(liger, family, off):
    model, stock = tiny_model(family), modeling_llama.apply_rotary_pos_emb
    arguments = SimpleNamespace(**ON, liger_kernel_config={"rope": True})
    with fused_layers(model, arguments):
        if family == "llama":
            to_llama()
            assert modeling_llama.apply_rotary_pos_emb is to_llama
    assert modeling_llama.apply_rotary_pos_emb is stock
    losses = {"cross_entropy", "fused_linear_cross_entropy"}
    assert arguments.liger_kernel_config == {"rope": True} | dict.fromkeys(losses | off, False)


def test_nothing_is_looked_for_where_none_is_asked_for(monkeypatch):
    monkeypatch.setitem(sys.modules, "liger_kernel", None)
    check_fused_layers({"use_liger_kernel": False}, info_of(tiny_model().config), where="train")
    arguments = SimpleNamespace(use_liger_kernel=False, liger_kernel_config=None)
    with fused_layers(tiny_model(), arguments):
        assert arguments.liger_kernel_config is None
