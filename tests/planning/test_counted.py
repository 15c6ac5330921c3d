"""Counts of models are kept from plan to plan, and made again where that may not be."""

from __future__ import annotations

import pytest
from transformers import MistralConfig

from dominie.planning import counted as module
from dominie.planning.sizes import shape_of, training_flops
from dominie.planning.trace import Pass, traced

CONFIG = MistralConfig(
    vocab_size=50,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
)


@pytest.fixture(autouse=True)
def empty(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(module, "_here", {})


def counts(config):
    run = Pass(rows=2, length=8, dtype="fp32", trained=True)
    return shape_of(config), training_flops(config, None), traced(config, run)


def test_what_was_counted_is_read_in_the_next_process(monkeypatch):
    fresh = counts(CONFIG)
    monkeypatch.setattr(module, "_here", {})
    monkeypatch.setattr("dominie.planning.trace.bare_model", None)
    monkeypatch.setattr("dominie.planning.sizes.bare_model", None)
    assert counts(CONFIG) == fresh


@pytest.mark.parametrize("damage", ["{", '{"checksum": "0"}'])
def test_a_damaged_file_is_counted_again(monkeypatch, damage):
    fresh = counts(CONFIG)
    module._place().write_text(damage)
    monkeypatch.setattr(module, "_here", {})
    assert counts(CONFIG) == fresh


def test_a_model_with_code_of_its_own_is_counted_every_time():
    own = MistralConfig(**{**CONFIG.to_dict(), "auto_map": {"AutoConfig": "a.B"}})
    module.counted(own, "what", lambda: Pass(1, 2, "fp32"), Pass)
    assert not module._place().exists()


def test_a_folder_that_cannot_be_written_costs_time_alone(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert counts(CONFIG)[0].layers == 2
