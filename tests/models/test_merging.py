"""Merged weights are the sum they are said to be, shard by shard."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import tiny_model
from transformers import AutoModelForCausalLM

from dominie.core.errors import InputError
from dominie.models import weight_writer
from dominie.models.merging import Merge, merge_models
from dominie.models.spec import Model


def saved(folder: Path, seed: int, dtype: torch.dtype = torch.float32, **changes: int) -> Model:
    tiny_model("llama", seed=seed, dtype=dtype, **changes).save_pretrained(folder)
    return Model(path=str(folder))


@pytest.fixture
def three(tmp_path) -> dict[str, Model]:
    return {name: saved(tmp_path / name, seed) for seed, name in enumerate("abc")}


def loaded(path: Path | str) -> dict[str, torch.Tensor]:
    return AutoModelForCausalLM.from_pretrained(path).state_dict()


def test_a_linear_merge_is_the_normalised_sum(three, tmp_path):
    merge = Merge(models={"a": 1.0, "b": 2.0, "c": 1.0})
    parameters = merge_models(merge, three, tmp_path / "out")
    a, b, c = (loaded(three[name].path) for name in "abc")
    found = loaded(tmp_path / "out")
    assert parameters == sum(tensor.numel() for tensor in found.values())
    for name, tensor in found.items():
        expected = 0.25 * a[name].double() + 0.5 * b[name].double() + 0.25 * c[name].double()
        torch.testing.assert_close(tensor.double(), expected, atol=1e-7, rtol=1e-6)


def test_task_arithmetic_adds_what_was_learnt(three, tmp_path):
    merge = Merge(models={"b": 0.7, "c": -0.2}, method="task_arithmetic", base="a")
    merge_models(merge, three, tmp_path / "out")
    a, b, c = (loaded(three[name].path) for name in "abc")
    for name, tensor in loaded(tmp_path / "out").items():
        base = a[name].double()
        expected = base + 0.7 * (b[name].double() - base) - 0.2 * (c[name].double() - base)
        torch.testing.assert_close(tensor.double(), expected, atol=1e-6, rtol=1e-5)


def test_one_model_alone_comes_out_as_it_went_in(three, tmp_path):
    merge_models(Merge(models={"b": 3.0}), three, tmp_path / "out")
    before = loaded(three["b"].path)
    assert all(torch.equal(tensor, before[n]) for n, tensor in loaded(tmp_path / "out").items())


def test_shards_and_dtype_are_kept(tmp_path, monkeypatch):
    models = {name: saved(tmp_path / name, seed, torch.bfloat16) for seed, name in enumerate("ab")}
    merge = Merge(models={"a": 0.5, "b": 0.5})
    merge_models(merge, models, tmp_path / "whole")
    monkeypatch.setattr(weight_writer, "SHARD", "4KB")
    merge_models(merge, models, tmp_path / "shards")
    merge_models(merge, models, tmp_path / "again")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    whole, shards = loaded(tmp_path / "whole"), loaded(tmp_path / "shards")
    assert all(torch.equal(whole[name], shards[name]) for name in whole)
    assert whole["model.norm.weight"].dtype == torch.bfloat16
    for file in (tmp_path / "shards").iterdir():
        assert file.read_bytes() == (tmp_path / "again" / file.name).read_bytes()
    back = merge_models(
        merge, {**models, "a": Model(path=str(tmp_path / "shards"))}, tmp_path / "c"
    )
    assert back == sum(t.numel() for t in whole.values())


def test_models_of_different_shape_are_refused(three, tmp_path):
    other = saved(tmp_path / "wide", 0, intermediate_size=32)
    with pytest.raises(InputError, match="different shape") as refused:
        merge_models(Merge(models={"a": 1, "wide": 1}), {**three, "wide": other}, tmp_path / "out")
    assert "mlp" in str(refused.value)
    deep = saved(tmp_path / "deep", 0, num_hidden_layers=3)
    with pytest.raises(InputError, match="no such tensor"):
        merge_models(Merge(models={"a": 1, "deep": 1}), {**three, "deep": deep}, tmp_path / "out")


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"models": {}}, "nothing to merge"),
        ({"models": {"a": float("nan")}}, "finite"),
        ({"models": {"a": 1.0, "b": -1.0}}, "more than 0"),
        ({"models": {"a": 1.0}, "method": "task_arithmetic"}, "needs a base"),
        ({"models": {"a": 1.0}, "base": "b"}, "has no base"),
    ],
)
def test_weights_that_mean_nothing_are_refused(settings, said):
    with pytest.raises(ValueError, match=said):
        Merge(**settings)


def broken(model: Model, name: str, change) -> None:
    """Replace a tensor in the file of a model."""
    file = Path(model.path) / "model.safetensors"
    tensors = load_file(file)
    tensors[name] = change(tensors[name])
    save_file(tensors, file, metadata={"format": "pt"})


DOWN = "model.layers.1.mlp.down_proj.weight"


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_model_that_is_not_finite_is_named_and_not_merged(three, tmp_path, value):
    broken(three["b"], DOWN, lambda tensor: tensor.index_fill(1, torch.tensor([3]), value))
    with pytest.raises(InputError, match=rf"(?s)not be finite.*b in {DOWN}"):
        merge_models(Merge(models={"a": 1.0, "b": 1.0}), three, tmp_path / "out")


def test_a_sum_that_overflows_its_dtype_is_refused(tmp_path):
    models = {name: saved(tmp_path / name, seed, torch.float16) for seed, name in enumerate("ab")}
    merge = Merge(models={"b": 1e7}, method="task_arithmetic", base="a")
    with pytest.raises(InputError, match=r"result in torch\.float16"):
        merge_models(merge, models, tmp_path / "out")


def test_zeros_are_no_model(three, tmp_path):
    nothing = Merge(models={"b": 1.0}, method="task_arithmetic", base="a")
    for name in loaded(three["b"].path):
        if name in load_file(Path(three["b"].path) / "model.safetensors"):
            broken(three["b"], name, torch.zeros_like)
    with pytest.raises(InputError, match="would be zeros"):
        merge_models(nothing, three, tmp_path / "out")


def test_an_embedding_of_zeros_is_no_model(three, tmp_path):
    broken(three["a"], "model.embed_tokens.weight", torch.zeros_like)
    with pytest.raises(InputError, match="embed_tokens"):
        merge_models(Merge(models={"a": 1.0}), three, tmp_path / "out")


def test_a_block_that_begins_at_zero_is_one(three, tmp_path):
    """Blocks that were added to a model begin with projections of zeros."""
    for name in (DOWN, "model.layers.1.self_attn.o_proj.weight"):
        broken(three["a"], name, torch.zeros_like)
    merge_models(Merge(models={"a": 1.0}), three, tmp_path / "out")
    assert not loaded(tmp_path / "out")[DOWN].any()
