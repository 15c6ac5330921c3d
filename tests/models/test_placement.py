"""A teacher whose layers wait in main memory says what it says anywhere."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny import tiny_folder

from dominie.core.errors import InputError
from dominie.data.batch import collate
from dominie.data.tokenization import Encoded
from dominie.models.loading import load_frozen, load_student
from dominie.models.placement import warn_of_whole_experts
from dominie.models.spec import Model
from dominie.teachers import LocalTeacher


@pytest.fixture
def mixtral(tmp_path: Path) -> str:
    tiny_folder(tmp_path / "mixtral", "mixtral", num_local_experts=4)
    return str(tmp_path / "mixtral")


def test_its_signal_is_the_same(mixtral):
    plain, waiting = (
        load_frozen(Model(path=mixtral, placement=placement)) for placement in (None, "cpu")
    )
    layers = list(waiting.model.layers.parameters())
    assert all(parameter.device.type == "meta" for parameter in layers)
    assert waiting.lm_head.weight.device.type == "cpu"
    rows = [Encoded([1, 7, 9, 4], [False, False, True, True]), Encoded([3, 2], [True, True])]
    batch = collate([(0, row) for row in rows])
    parts = []
    for model in (plain, waiting):
        signal = LocalTeacher(model, attention_layers=[0, 1]).signal(batch)
        parts += signal.parts
    one, other = parts
    torch.testing.assert_close(other.target.hidden, one.target.hidden)
    torch.testing.assert_close(other.target.head.weight, one.target.head.weight)
    for layer in (0, 1):
        torch.testing.assert_close(other.attention[layer].query, one.attention[layer].query)
        torch.testing.assert_close(other.attention[layer].key, one.attention[layer].key)
    assert all(parameter.device.type == "meta" for parameter in waiting.model.layers.parameters())


def test_it_is_for_frozen_models_alone(mixtral):
    for placement in ("cpu", "sharded", "cached"):
        with pytest.raises(InputError, match="cannot be trained"):
            load_student(Model(path=mixtral, placement=placement))


def test_what_quantisation_leaves_whole_is_said(mixtral, caplog):
    """bitsandbytes knows linear layers, and the experts of a layer are one tensor."""
    model = load_frozen(Model(path=mixtral))
    warn_of_whole_experts(model, Model(path=mixtral, quantize="4bit"))
    (record,) = caplog.records
    experts = 2 * 4 * 3 * 16 * 24
    share = 100 * experts / sum(p.numel() for p in model.parameters())
    assert f"leaves the experts of a student as they are, {share:.0f} %" in record.getMessage()
