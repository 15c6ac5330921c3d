"""A narrower model computes what the wider one does without the parts that were left out."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny import tiny_config, tiny_folder
from torch import Tensor
from transformers import AutoModelForCausalLM

from dominie.core.errors import InputError
from dominie.data.batch import collate
from dominie.data.row_store import Row
from dominie.models.importance import part_scores, strongest
from dominie.models.info import info_of
from dominie.models.pruned_weights import Kept, prune_model
from dominie.models.pruning import Prune, pruned_config
from dominie.models.spec import Model

SIZES = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
IDS = torch.tensor([[5, 9, 60, 3, 3, 17, 41, 8, 22, 0, 1]])
HEADS = torch.tensor([[1], [0]])  # key heads kept in each layer
NEURONS = torch.tensor([[0, 5, 6, 11, 23], [1, 2, 3, 4, 22]])
EXPERTS = torch.tensor([[0, 2], [1, 2]])
CHANNELS = torch.tensor([0, 1, 3, 4, 6, 9, 12, 15])


def saved(folder: Path, family: str = "llama", **changes: Any) -> Model:
    return Model(path=str(tiny_folder(folder, family, **SIZES, **changes)))


def loaded(folder: Path | str) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder).eval()


@torch.no_grad()
def logits(model: Any) -> Tensor:
    return model(IDS, use_cache=False).logits


def others(kept: Tensor, count: int) -> list[int]:
    return sorted(set(range(count)) - set(kept.tolist()))


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen3", "gemma3_text", "mixtral"])
def test_heads_are_left_out_in_groups(family, tmp_path):
    changes = {"attention_bias": True} if family in ("llama", "qwen3", "gemma3_text") else {}
    model = saved(tmp_path / "big", family, **changes)
    prune = Prune(model="m", heads=2, source="s")
    prune_model(prune, model, tmp_path / "small", Kept(layers=[0, 1], key_heads=HEADS))
    small, big = loaded(tmp_path / "small"), loaded(model.path)
    whole = logits(big)
    width = small.config.head_dim * 2
    for layer, kept in zip(big.model.layers, HEADS, strict=True):
        for group in others(kept, 2):
            layer.self_attn.o_proj.weight.data[:, group * width : (group + 1) * width] = 0
    torch.testing.assert_close(logits(small), logits(big), atol=1e-5, rtol=1e-4)
    assert not torch.allclose(logits(small), whole, atol=1e-2)
    assert (small.config.num_attention_heads, small.config.num_key_value_heads) == (2, 1)


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3", "gemma3_text"])
def test_neurons_are_left_out(family, tmp_path):
    model = saved(tmp_path / "big", family)
    prune = Prune(model="m", intermediate_size=5, source="s")
    prune_model(prune, model, tmp_path / "small", Kept(layers=[0, 1], neurons=NEURONS))
    big = loaded(model.path)
    for layer, kept in zip(big.model.layers, NEURONS, strict=True):
        layer.mlp.down_proj.weight.data[:, others(kept, 24)] = 0
    torch.testing.assert_close(
        logits(loaded(tmp_path / "small")), logits(big), atol=1e-5, rtol=1e-4
    )


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3", "mixtral"])
def test_channels_are_left_out(family, tmp_path):
    """Channels that hold nothing but zeros change nothing, once norms are of the rest."""
    tied = {"tie_word_embeddings": family == "llama"}
    model = saved(tmp_path / "big", family, rms_norm_eps=1e-9, **tied)
    heads = {"heads": 2} if family == "qwen2" else {}
    prune = Prune(model="m", hidden_size=8, source="s", **heads)
    keys = HEADS if heads else None
    kept = Kept(layers=[0, 1], channels=CHANNELS, key_heads=keys)
    prune_model(prune, model, tmp_path / "small", kept)
    big, small = loaded(model.path), loaded(tmp_path / "small")
    gone = others(CHANNELS, 16)
    with torch.no_grad():
        big.model.embed_tokens.weight[:, gone] = 0
        big.model.norm.weight *= math.sqrt(1 / 2)
        for layer, groups in zip(big.model.layers, HEADS, strict=True):
            layer.input_layernorm.weight *= math.sqrt(1 / 2)
            layer.post_attention_layernorm.weight *= math.sqrt(1 / 2)
            layer.self_attn.o_proj.weight[gone] = 0
            if heads:
                for group in others(groups, 2):
                    layer.self_attn.o_proj.weight[:, group * 8 : (group + 1) * 8] = 0
            if family == "mixtral":
                layer.mlp.experts.down_proj[:, gone] = 0
            else:
                layer.mlp.down_proj.weight[gone] = 0
    torch.testing.assert_close(logits(small), logits(big), atol=1e-4, rtol=1e-3)
    assert small.config.hidden_size == 8


def test_experts_are_left_out(tmp_path):
    model = saved(tmp_path / "big", "mixtral")
    prune = Prune(model="m", experts=2, source="s")
    prune_model(prune, model, tmp_path / "small", Kept(layers=[0, 1], experts=EXPERTS))
    big = loaded(model.path)
    for layer, kept in zip(big.model.layers, EXPERTS, strict=True):
        experts, gate = layer.mlp.experts, layer.mlp.gate
        experts.gate_up_proj.data = experts.gate_up_proj[kept].data
        experts.down_proj.data = experts.down_proj[kept].data
        gate.weight.data = gate.weight[kept].data
        experts.num_experts = gate.num_experts = 2
    torch.testing.assert_close(
        logits(loaded(tmp_path / "small")), logits(big), atol=1e-6, rtol=1e-5
    )


def test_one_cut_of_everything_is_many_cuts(tmp_path):
    changes = {"num_hidden_layers": 3}
    model = Model(path=str(tiny_folder(tmp_path / "big", "mixtral", **{**SIZES, **changes})))
    heads, experts = torch.tensor([[1], [0], [1]]), torch.tensor([[0, 2], [0, 1], [1, 2]])
    prune = Prune(model="m", layers=[0, 2], heads=2, hidden_size=8, experts=2, source="s")
    kept = Kept(layers=[0, 2], key_heads=heads, channels=CHANNELS, experts=experts)
    parameters = prune_model(prune, model, tmp_path / "once", kept)
    steps = [
        (Prune(model="m", heads=2, source="s"), Kept(layers=range(3), key_heads=heads)),
        (Prune(model="m", layers=[0, 2]), Kept(layers=[0, 2])),
        (Prune(model="m", experts=2, source="s"), Kept(layers=[0, 1], experts=experts[[0, 2]])),
        (Prune(model="m", hidden_size=8, source="s"), Kept(layers=[0, 1], channels=CHANNELS)),
    ]
    for number, (setting, some) in enumerate(steps):
        prune_model(setting, model, tmp_path / str(number), some)
        model = Model(path=str(tmp_path / str(number)))
    one, other = (load_file(tmp_path / n / "model.safetensors") for n in ("once", "3"))
    assert one.keys() == other.keys()
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())
    assert (tmp_path / "once" / "config.json").read_text() == (
        tmp_path / "3" / "config.json"
    ).read_text()
    assert loaded(tmp_path / "once").num_parameters() == parameters


def rows() -> list[Row]:
    generator = torch.Generator().manual_seed(3)
    ids = [torch.randint(0, 61, (3 + 2 * n,), generator=generator) for n in range(5)]
    return [Row(each.numpy().astype("int32"), (each % 3 > 0).numpy()) for each in ids]


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_scores_are_those_of_a_naive_computation(family, tmp_path):
    model = loaded(saved(tmp_path / "big", family).path)
    parts = ["heads", "hidden_size", "experts" if family == "mixtral" else "intermediate_size"]
    batches = [collate([(0, row) for row in part]) for part in (rows()[:2], rows()[2:])]
    found = part_scores(model, batches, parts)
    naive: dict[str, Any] = {"heads": 0.0, "neurons": 0.0, "channels": {}, "experts": 0}
    for row in rows():
        seen: dict[str, list[Tensor]] = {"heads": [], "neurons": [], "channels": [], "experts": []}
        hooks = []
        for layer in model.model.layers:
            take = layer.self_attn.o_proj.register_forward_pre_hook
            hooks.append(take(lambda _, x, seen=seen: seen["heads"].append(x[0][0].double())))
            if family == "mixtral":
                take = layer.mlp.gate.register_forward_hook
                hooks.append(take(lambda _, __, y, seen=seen: seen["experts"].append(y[-1])))
            else:
                take = layer.mlp.down_proj.register_forward_pre_hook
                hooks.append(take(lambda _, x, seen=seen: seen["neurons"].append(x[0][0].double())))
            for norm in (layer.input_layernorm, layer.post_attention_layernorm):
                take = norm.register_forward_hook
                hooks.append(
                    take(lambda _, __, y, seen=seen: seen["channels"].append(y[0].double()))
                )
        with torch.no_grad():
            model(torch.tensor(row.input_ids[None].astype("int64")))
        for hook in hooks:
            hook.remove()
        by_head = torch.stack(seen["heads"]).unflatten(-1, (4, 4)).norm(dim=-1)  # [layer, L, head]
        naive["heads"] += by_head.mean(1) ** 2
        for place, states in enumerate(seen["channels"]):
            before = naive["channels"].get(place, 0.0)
            naive["channels"][place] = before + states.abs().mean(0) ** 2
        if family == "mixtral":
            counted = [torch.bincount(chosen.flatten(), minlength=3) for chosen in seen["experts"]]
            naive["experts"] += torch.stack(counted)
        else:
            naive["neurons"] += torch.stack(seen["neurons"]).abs().mean(1) ** 2
    groups = naive["heads"].unflatten(-1, (2, 2)).sum(-1).sqrt()
    channels = sum(each.sqrt() for each in naive["channels"].values())
    close = {"rtol": 1e-5, "atol": 1e-7, "check_dtype": False}
    torch.testing.assert_close(found.key_heads, groups, **close)
    torch.testing.assert_close(found.channels, channels, **close)
    if family == "mixtral":
        assert torch.equal(found.experts, naive["experts"])
        assert found.neurons is None
    else:
        torch.testing.assert_close(found.neurons, naive["neurons"].sqrt(), **close)
        assert found.experts is None
    for module in model.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks


def test_the_strongest_are_in_order_and_the_first_of_equals():
    scores = torch.tensor([[1.0, 5.0, 5.0, 2.0], [3.0, 3.0, 3.0, 3.0]])
    assert strongest(scores, 2).tolist() == [[1, 2], [0, 1]]
    assert strongest(scores, 3).tolist() == [[1, 2, 3], [0, 1, 2]]


@pytest.mark.parametrize(
    ("family", "settings", "message"),
    [
        ("mixtral", {"intermediate_size": 8}, "cannot be made narrower there"),
        ("gemma3_text", {"hidden_size": 8}, "heads, intermediate_size"),
        ("llama", {"experts": 2}, "cannot be made narrower there"),
        ("mixtral", {"experts": 1}, "from 2 to 2"),
        ("mixtral", {"experts": 3}, "from 2 to 2"),
        ("llama", {"intermediate_size": 24}, "from 1 to 23"),
        ("llama", {"heads": 3}, "heads in groups of 2"),
        ("llama", {"heads": 2, "hidden_size": 9}, "2 heads, hidden_size 9"),
        ("llama", {"hidden_size": 10}, "a multiple of"),
        ("qwen2", {"heads": 2}, "set heads and hidden_size together"),
    ],
)
def test_widths_that_no_model_has_are_refused(family, settings, message):
    config = tiny_config(family, **SIZES)
    with pytest.raises(InputError, match=message):
        pruned_config(Prune(model="m", source="s", **settings), info_of(config), where="w")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "nothing is left out"),
        ({"heads": 2}, "heads needs a source"),
        ({"heads": 0, "source": "s"}, "heads must be at least 1"),
        ({"heads": 2, "keep": "ends", "source": "s"}, "set layers"),
    ],
)
def test_settings_that_mean_nothing_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        Prune(model="m", **settings)
