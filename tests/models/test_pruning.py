"""A pruned model computes what the larger one does without the layers that were left out."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny import FAMILIES, tiny_config, tiny_folder
from transformers import AutoModelForCausalLM

from dominie.core.errors import InputError
from dominie.data.batch import collate
from dominie.data.row_store import Row
from dominie.models import weight_writer
from dominie.models.importance import block_angles, next_token_loss
from dominie.models.info import describe, info_of
from dominie.models.pruned_weights import Kept, prune_model
from dominie.models.pruning import Prune, kept_pairs, pruned_config
from dominie.models.spec import Model

DEPTH = 5
#: What makes layers of a family differ beside their weights.
PATTERNS: dict[str, dict[str, Any]] = {
    "llama": {"tie_word_embeddings": True},
    "mistral": {"sliding_window": 3},
    "qwen2": {"use_sliding_window": True, "sliding_window": 3, "max_window_layers": 3},
    "qwen3": {"use_sliding_window": True, "sliding_window": 3, "max_window_layers": 2},
    "gemma3_text": {"sliding_window": 3, "sliding_window_pattern": 2},
    "mixtral": {},
}
IDS = torch.tensor([[5, 9, 60, 3, 3, 17, 41, 8, 22, 0, 1]])


def saved(folder: Path, family: str = "llama", **changes: Any) -> Model:
    changes = {**PATTERNS.get(family, {}), "num_hidden_layers": DEPTH, **changes}
    return Model(path=str(tiny_folder(folder, family, **changes)))


def cut(prune: Prune, model: Model, folder: Path, layers: list[int]) -> int:
    return prune_model(prune, model, folder, Kept(layers=layers))


def loaded(folder: Path | str) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder).eval()


def skipped(model: Any, layers: list[int]) -> Any:
    """The model with all other layers handing on what they are given."""
    for number, layer in enumerate(model.model.layers):
        if number not in layers:
            layer.register_forward_hook(lambda _, given, __: given[0])
    return model


@pytest.mark.parametrize("family", PATTERNS)
@pytest.mark.parametrize("layers", [[0, 2, 4], [3]])
def test_it_computes_what_the_larger_model_does_without_the_layers(family, layers, tmp_path):
    model = saved(tmp_path / "big", family)
    parameters = cut(Prune(model="m", layers=layers), model, tmp_path / "small", layers)
    small = loaded(tmp_path / "small")
    with torch.no_grad():
        expected = skipped(loaded(model.path), layers)(IDS, use_cache=False).logits
        assert torch.equal(small(IDS, use_cache=False).logits, expected)
        whole = loaded(model.path)(IDS).logits
        cached = small(IDS[:, -1:], past_key_values=small(IDS[:, :-1]).past_key_values).logits
    assert not torch.allclose(whole, expected, atol=1e-3)
    torch.testing.assert_close(cached[:, -1], expected[:, -1], atol=1e-4, rtol=1e-4)
    assert small.num_parameters() == parameters
    config = json.loads((tmp_path / "small" / "config.json").read_text())
    assert config["num_hidden_layers"] == len(layers)
    if "max_window_layers" in config:
        before = PATTERNS[family]["max_window_layers"]
        assert config["max_window_layers"] == sum(layer < before for layer in layers)
    info = describe(Model(path=str(tmp_path / "small")))
    assert (info.kept_layers, info.original_layers) == (tuple(layers), DEPTH)


def test_the_configuration_is_known_before_the_model_exists(tmp_path):
    model = saved(tmp_path / "big", "gemma3_text")
    prune = Prune(model="m", layers=[0, 1, 4])
    before = pruned_config(prune, describe(model), where="w")
    cut(prune, model, tmp_path / "small", [0, 1, 4])
    after = describe(Model(path=str(tmp_path / "small"))).config
    assert before.layer_types == after.layer_types
    assert len(set(after.layer_types)) == 2
    assert before.to_dict() == {**after.to_dict(), "_name_or_path": before._name_or_path}


def test_shards_dtype_and_bytes_are_kept(tmp_path, monkeypatch):
    model = saved(tmp_path / "big", dtype=torch.bfloat16)
    before = load_file(Path(model.path) / "model.safetensors")
    prune = Prune(model="m", layers=3)
    layers = prune.chosen_layers(DEPTH)
    assert layers == [0, 2, 4]
    cut(prune, model, tmp_path / "once", layers)
    cut(prune, model, tmp_path / "twice", layers)
    for file in (tmp_path / "once").iterdir():
        assert file.read_bytes() == (tmp_path / "twice" / file.name).read_bytes()
    monkeypatch.setattr(weight_writer, "SHARD", 3000)
    cut(prune, model, tmp_path / "shards", layers)
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    one, other = loaded(tmp_path / "once").state_dict(), loaded(tmp_path / "shards").state_dict()
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())
    for name, tensor in load_file(tmp_path / "once" / "model.safetensors").items():
        source = name
        for new, old in reversed(list(enumerate(layers))):
            source = source.replace(f"layers.{new}.", f"layers.{old}.") if old != new else source
            if source != name:
                break
        assert tensor.dtype == torch.bfloat16
        assert torch.equal(tensor, before[source])


@pytest.mark.parametrize(
    ("settings", "depth", "kept"),
    [
        ({"layers": 15}, 30, [0, 2, 4, 6, 8, 10, 12, 15, 17, 19, 21, 23, 25, 27, 29]),
        ({"layers": 3, "keep": "uniform"}, 6, [0, 3, 5]),
        ({"layers": 2}, 7, [0, 6]),
        ({"layers": 1}, 7, [0]),
        ({"layers": 6}, 7, [0, 1, 2, 4, 5, 6]),
        ({"layers": 5, "keep": "ends"}, 12, [0, 1, 2, 10, 11]),
        ({"layers": 1, "keep": "ends"}, 3, [0]),
        ({"layers": [1, 3, 4]}, 6, [1, 3, 4]),
        ({"layers": 4, "keep": "influence", "source": "s"}, 6, None),
    ],
)
def test_which_layers_are_kept(settings, depth, kept):
    assert Prune(model="m", **settings).chosen_layers(depth) == kept


def test_a_uniform_choice_ascends_and_has_both_ends():
    for depth in range(2, 40):
        for count in range(2, depth + 1):
            layers = Prune(model="m", layers=count).chosen_layers(depth)
            assert layers is not None
            assert len(set(layers)) == count
            assert layers == sorted(layers)
            assert (layers[0], layers[-1]) == (0, depth - 1)


def rows(count: int = 7) -> list[Row]:
    generator = torch.Generator().manual_seed(3)
    made = []
    for number in range(count):
        ids = torch.randint(0, 61, (4 + number,), generator=generator)
        made.append(Row(ids.numpy().astype("int32"), (ids % 3 > 0).numpy()))
    return made


def test_angles_and_losses_are_those_of_a_naive_computation(tmp_path):
    model = loaded(saved(tmp_path / "big").path).double()
    batches = [collate([(0, row) for row in part]) for part in (rows()[:3], rows()[3:])]
    starts, length = [1, 2], 2
    found = block_angles(model, batches, starts, length)
    angles: dict[int, list[float]] = {start: [] for start in starts}
    losses = []
    for row in rows():
        ids = torch.tensor(row.input_ids[None].astype("int64"))
        with torch.no_grad():
            output = model(ids, output_hidden_states=True)
        for start in starts:
            ends = (output.hidden_states[layer][0] for layer in (start, start + length))
            for one, other in zip(*ends, strict=True):
                cosine = float(one @ other / (one.norm() * other.norm()))
                angles[start].append(math.acos(max(-1.0, min(1.0, cosine))) / math.pi)
        likely = output.logits[0].log_softmax(-1)
        taught = (position for position in range(1, ids.shape[1]) if row.supervised[position])
        losses += [-float(likely[position - 1, ids[0, position]]) for position in taught]
    for start in starts:
        assert found[start] == pytest.approx(sum(angles[start]) / len(angles[start]), rel=1e-5)
    assert found[1] != pytest.approx(found[2], rel=1e-3)
    loss = next_token_loss(model, batches)
    assert loss == pytest.approx(sum(losses) / len(losses), rel=1e-6)
    assert not any(layer._forward_pre_hooks for layer in model.model.layers)


def test_states_that_are_not_finite_are_refused(tmp_path):
    model = loaded(saved(tmp_path / "big").path)
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[0, 0] = math.nan
    with pytest.raises(InputError, match="hidden states are not finite"):
        block_angles(model, [collate([(0, rows()[0])])], [1, 2], 2)


def test_the_block_begins_and_ends_within_the_model():
    for depth in range(3, 20):
        for count in range(2, depth):
            prune = Prune(model="m", layers=count, keep="influence", source="s")
            starts = prune.block_starts(depth)
            edge = 1 if count < 4 else 2
            assert list(starts) == list(range(edge, count - edge + 1))
            assert starts[-1] + depth - count < depth


def test_layers_are_paired_by_what_they_were(tmp_path):
    big = saved(tmp_path / "big")
    small, smaller = (Model(path=str(tmp_path / name)) for name in ("small", "smaller"))
    cut(Prune(model="m", layers=3), big, tmp_path / "small", [0, 2, 4])
    cut(Prune(model="m", layers=2), small, tmp_path / "smaller", [1, 2])
    whole, half, third = (describe(model) for model in (big, small, smaller))
    assert third.kept_layers == (2, 4)
    assert kept_pairs(half, whole) == [(0, 0), (1, 2), (2, 4)]
    assert kept_pairs(third, whole) == [(0, 2), (1, 4)]
    assert kept_pairs(third, half) == [(0, 1), (1, 2)]
    assert kept_pairs(half, half) == [(0, 0), (1, 1), (2, 2)]
    with pytest.raises(InputError, match="a prune stage made"):
        kept_pairs(whole, whole)
    with pytest.raises(InputError, match="without \\[0\\]"):
        kept_pairs(half, third)
    with pytest.raises(InputError, match="of 4 layers"):
        kept_pairs(half, info_of(tiny_config("llama", num_hidden_layers=4), name="other"))


@pytest.mark.parametrize("kept", [[0, 0], [1, 0], [0], [0, 9], ["0", "1"], "01", [-1, 1]])
def test_keys_of_somebody_else_mean_nothing(kept):
    config = tiny_config("llama", kept_layers=kept, original_num_hidden_layers=5)
    assert info_of(config).kept_layers is None


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"layers": 0}, "at least 1"),
        ({"layers": []}, "a list of layers"),
        ({"layers": [0, 2, 2]}, "names none twice"),
        ({"layers": [2, 0]}, "ascends"),
        ({"layers": [-1, 2]}, "from 0"),
        ({"layers": [0, 2], "keep": "ends"}, "set layers to their number"),
        ({"layers": 3, "keep": "influence"}, "needs a source"),
        ({"layers": 1, "keep": "influence", "source": "s"}, "2 or more"),
        ({"layers": 2, "rows": 0}, "rows must be"),
    ],
)
def test_settings_that_mean_nothing_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        Prune(model="m", **settings)


@pytest.mark.parametrize(
    ("family", "changes", "layers", "message"),
    [
        ("llama", {}, 6, "does not have the layers"),
        ("llama", {}, [0, 5], "does not have the layers"),
        ("llama", {}, 5, "nothing is left out"),
        ("llama", {}, [0, 1, 2, 3, 4], "nothing is left out"),
        ("gemma2", {}, 2, "this architecture cannot be pruned"),
        ("qwen3_moe", {}, 2, "qwen3_moe"),
        ("llama", {"quantization_config": {"quant_method": "x"}}, 2, "before it was quantised"),
    ],
)
def test_models_that_cannot_be_cut_so_are_refused(family, changes, layers, message):
    assert family in FAMILIES
    config = tiny_config(family, num_hidden_layers=DEPTH, **changes)
    with pytest.raises(InputError, match=message) as refused:
        pruned_config(Prune(model="m", layers=layers), info_of(config, name="m"), where="here")
    assert "here" in str(refused.value)


def test_files_without_a_layer_are_refused(tmp_path):
    model = saved(tmp_path / "big")
    config = json.loads((tmp_path / "big" / "config.json").read_text())
    config["num_hidden_layers"] = 7
    (tmp_path / "big" / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="tensors of layers 0 to 6"):
        cut(Prune(model="m", layers=2), model, tmp_path / "small", [0, 6])
