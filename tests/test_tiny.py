"""The tiny models are of the families that they are named after, and made from their seed alone."""

from __future__ import annotations

import pytest
import torch
from tiny import FAMILIES, tiny_folder, tiny_model
from transformers import AutoModelForCausalLM


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_follows_from_its_seed(family):
    model, same, other = (tiny_model(family, seed=seed) for seed in (1, 1, 2))
    assert model.config.model_type == family
    ids = torch.arange(12)[None]
    with torch.no_grad():
        logits, again, apart = (each.eval()(ids).logits for each in (model, same, other))
    assert torch.equal(logits, again)
    assert (logits - apart).abs().max() > 0.01


def test_a_folder_is_loaded_by_transformers(tmp_path):
    folder = tiny_folder(tmp_path / "m", "llama", hidden_size=8)
    assert AutoModelForCausalLM.from_pretrained(folder).config.hidden_size == 8
