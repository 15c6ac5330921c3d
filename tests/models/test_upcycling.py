"""A mixture of experts computes what its dense model does, and is made to part from there."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import tiny_config
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    Gemma2Config,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

from dominie.core.errors import InputError
from dominie.models import weight_writer
from dominie.models.info import info_of
from dominie.models.loading import load_frozen
from dominie.models.moe import mixture_of
from dominie.models.router_init import centre_gate
from dominie.models.spec import Model
from dominie.models.upcycling import Upcycle, planned_tensors, upcycle_model
from dominie.models.weights import Weights

SIZES: dict[str, Any] = {
    "vocab_size": 60,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 100.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
DENSE: dict[str, PreTrainedConfig] = {
    "mistral": MistralConfig(**SIZES, sliding_window=5),
    "mistral-wide-heads": MistralConfig(**SIZES, head_dim=16, sliding_window=None),
    "llama": LlamaConfig(**SIZES),
    "llama-scaled-rope-tied": LlamaConfig(
        **SIZES, rope_parameters=LLAMA3, tie_word_embeddings=True
    ),
    "qwen2": Qwen2Config(**SIZES),
    "qwen2-windows": Qwen2Config(
        **SIZES, use_sliding_window=True, sliding_window=5, max_window_layers=1
    ),
    "qwen3": Qwen3Config(**SIZES, head_dim=16),
    "qwen3-bias": Qwen3Config(**SIZES, attention_bias=True, tie_word_embeddings=True),
}
MIXTURES = {"mistral": "mixtral", "llama": "mixtral", "qwen2": "qwen2_moe", "qwen3": "qwen3_moe"}
IDS = torch.arange(40).reshape(2, 20) * 7 % 60


class Row(NamedTuple):
    input_ids: list[int]
    supervised: list[bool]


ROWS = [Row([(3 * i + 5 * j) % 60 for j in range(8 + i)], [True] * (8 + i)) for i in range(12)]


def saved(
    folder: Path, config: PreTrainedConfig, seed: int = 0, dtype: torch.dtype = torch.float32
) -> Model:
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config)
    for name, parameter in model.named_parameters():
        if "norm" in name or "bias" in name:  # or they would all be ones and zeros
            parameter.data += 0.1 * torch.randn_like(parameter)
    model.to(dtype).save_pretrained(folder)
    return Model(path=str(folder))


def logits(path: Path | str, ids: torch.Tensor = IDS) -> torch.Tensor:
    with torch.no_grad():
        return load_frozen(Model(path=str(path)))(ids).logits.float()


@pytest.fixture
def mistral(tmp_path: Path) -> Model:
    return saved(tmp_path / "dense", DENSE["mistral"])


def made(tmp_path: Path, dense: Model, name: str = "moe", **settings: Any) -> Path:
    upcycle_model(Upcycle(model="m", **settings), {"m": dense}, tmp_path / name, rows=ROWS)
    return tmp_path / name


@pytest.mark.parametrize("family", DENSE)
@pytest.mark.parametrize(
    "settings",
    [
        {"gate": "zeros"},
        {"gate": "random", "experts": 4},
        {"gate": "random", "experts": 3, "experts_per_token": 1},
        {"gate": "hidden_states", "source": "s"},
    ],
    ids=["zeros", "random", "top-1", "hidden states"],
)
def test_the_mixture_computes_what_the_dense_model_does(tmp_path, family, settings):
    dense = saved(tmp_path / "dense", DENSE[family])
    moe = made(tmp_path, dense, **settings)
    config = AutoConfig.from_pretrained(moe)
    assert config.model_type == MIXTURES[family.split("-")[0]]
    assert config.num_experts_per_tok == settings.get("experts_per_token", 2)
    expected, found = logits(dense.path), logits(moe)
    assert expected.std() > 0.1
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-5)


def test_in_bfloat16_it_is_equal_within_rounding(tmp_path):
    dense = saved(tmp_path / "dense", DENSE["llama"], dtype=torch.bfloat16)
    moe = made(tmp_path, dense)
    assert load_frozen(Model(path=str(moe))).dtype == torch.bfloat16
    expected = logits(dense.path)
    assert (logits(moe) - expected).norm() < 0.02 * expected.norm()


def test_it_is_the_same_byte_for_byte_however_it_is_cut(tmp_path, mistral, monkeypatch):
    settings = {"noise": 0.1, "reset": 0.25, "gate": "hidden_states", "source": "s", "experts": 3}
    whole = load_file(made(tmp_path, mistral, "whole", **settings) / "model.safetensors")
    monkeypatch.setattr(weight_writer, "SHARD", "8KB")
    shards = made(tmp_path, mistral, "shards", **settings)
    again = made(tmp_path, mistral, "again", **settings)
    names = sorted(file.name for file in shards.iterdir())
    assert len([name for name in names if name.endswith(".safetensors")]) > 3
    for name in names:
        assert (shards / name).read_bytes() == (again / name).read_bytes()
    parts: dict[str, torch.Tensor] = {}
    for file in shards.glob("*.safetensors"):
        parts |= load_file(file)
    assert parts.keys() == whole.keys()
    assert all(torch.equal(parts[name], whole[name]) for name in whole)
    other = made(tmp_path, mistral, "other", **settings, seed=1)
    assert not torch.equal(logits(other), logits(again))


def experts(folder: Path, projection: str, layer: int = 1) -> list[torch.Tensor]:
    tensors = load_file(folder / "model.safetensors")
    prefix = f"model.layers.{layer}.block_sparse_moe.experts"
    names = [name for name in tensors if name.startswith(prefix) and f".{projection}." in name]
    return [tensors[name] for name in sorted(names)]


def dense_weight(model: Model, projection: str, layer: int = 1) -> torch.Tensor:
    tensors = load_file(Path(model.path) / "model.safetensors")
    return tensors[f"model.layers.{layer}.mlp.{projection}.weight"]


@pytest.mark.parametrize("count", [2, 3])
def test_noise_is_scaled_to_each_weight_and_sums_to_zero(tmp_path, mistral, count):
    moe = made(tmp_path, mistral, noise=0.5, experts=count)
    for own, dense in (("w1", "gate_proj"), ("w3", "up_proj"), ("w2", "down_proj")):
        weight, found = dense_weight(mistral, dense), experts(moe, own)
        assert len(found) == count
        torch.testing.assert_close(torch.stack(found).mean(0), weight, atol=1e-6, rtol=1e-5)
        for expert in found:
            assert (expert - weight).std() / weight.std() == pytest.approx(0.5, rel=0.1)


def test_a_reset_redraws_the_same_units_in_all_projections(tmp_path, mistral):
    moe = made(tmp_path, mistral, reset=0.25)
    lost = []
    for expert in range(2):
        changed = []
        for own, dense, axis in (
            ("w1", "gate_proj", 1),
            ("w3", "up_proj", 1),
            ("w2", "down_proj", 0),
        ):
            weight, found = dense_weight(mistral, dense), experts(moe, own)[expert]
            differs = (weight != found).float().mean(axis)
            assert set(differs.tolist()) == {0.0, 1.0}
            changed.append(differs.nonzero().flatten().tolist())
            drawn = found[differs > 0] if axis else found[:, differs > 0]
            assert drawn.std() == pytest.approx(float(weight.std()), rel=0.2)
        assert changed[0] == changed[1] == changed[2]
        assert len(changed[0]) == 12
        lost.append(changed[0])
    assert lost[0] != lost[1]
    assert experts(moe, "w1", layer=0)[0].shape == (48, 32)


def test_siblings_lend_the_experts_after_the_first(tmp_path, mistral):
    others = {
        "a": saved(tmp_path / "a", DENSE["mistral"], 1),
        "b": saved(tmp_path / "b", DENSE["mistral"], 2, torch.bfloat16),
    }
    settings = Upcycle(model="m", siblings=["a", "b"], experts=4)
    upcycle_model(settings, {"m": mistral, **others}, tmp_path / "moe")
    found = experts(tmp_path / "moe", "w2")
    for expert, model in zip(found, [mistral, others["a"], others["b"], mistral], strict=True):
        assert expert.dtype == torch.float32
        assert torch.equal(expert, dense_weight(model, "down_proj").float())
    tensors = load_file(tmp_path / "moe" / "model.safetensors")
    dense = load_file(Path(mistral.path) / "model.safetensors")
    for name in dense.keys() & tensors.keys():
        assert torch.equal(tensors[name], dense[name])


@pytest.mark.parametrize("gate", ["random", "hidden_states"])
def test_a_gate_varies_over_tokens_by_its_scale(tmp_path, mistral, gate):
    source = {"source": "s"} if gate == "hidden_states" else {}
    moe = load_frozen(Model(path=str(made(tmp_path, mistral, gate=gate, gate_scale=2.0, **source))))
    seen = []
    for layer in moe.model.layers:
        layer.mlp.gate.register_forward_hook(lambda _, __, out: seen.append(out[0]))
    for row in ROWS:
        moe(torch.tensor(row.input_ids)[None])
    for layer in range(3):
        found = torch.cat(seen[layer::3])
        assert found.std() == pytest.approx(2.0, rel=0.5 if gate == "random" else 1e-4)
        share = (found[:, 0] > found[:, 1]).float().mean()
        if gate == "hidden_states":
            assert found.mean(0).abs().max() < 1e-4, "no expert is preferred by the mean token"
            assert 0.05 < share < 0.95


def test_a_gate_tells_clusters_apart():
    torch.manual_seed(0)
    centres = 5 * torch.randn(3, 16)
    kind = torch.arange(300) % 3
    states = 2.0 + centres[kind] + torch.randn(300, 16)
    chosen = (states @ centre_gate(states, 3, scale=1.0, seed=0).T).argmax(1)
    for cluster in range(3):
        members = chosen[kind == cluster]
        assert bool((members == members[0]).all())
    assert len(chosen.unique()) == 3


def test_equal_experts_and_a_gate_of_zeros_never_part_and_others_do(tmp_path, mistral):
    """The trap: top-2 of two identical experts has no router gradient, and equal expert ones."""
    router, apart = {}, {}
    for name, settings in {
        "copy": {"gate": "zeros"},
        "random": {"gate": "random"},
        "hidden": {"gate": "hidden_states", "source": "s"},
        "noise": {"gate": "zeros", "noise": 0.1},
    }.items():
        model = AutoModelForCausalLM.from_pretrained(made(tmp_path, mistral, name, **settings))
        for step in range(2):
            model.zero_grad()
            model(IDS, labels=IDS).loss.backward()
            if step == 0:
                with torch.no_grad():
                    for parameter in model.parameters():
                        parameter -= 0.1 * parameter.grad
        down = model.model.layers[1].mlp.experts.down_proj
        router[name] = float(model.model.layers[1].mlp.gate.weight.grad.norm())
        apart[name] = float((down[0] - down[1]).norm() / down.norm())
    assert router["copy"] < 1e-6
    assert apart["copy"] < 1e-6
    for name in ("random", "hidden", "noise"):
        assert router[name] > 1e-4, name
        assert apart[name] > 1e-4, name


def test_two_experts_of_mistral_7b_have_mixtrals_count():
    """At the paper's sizes, from shapes alone."""
    with torch.device("meta"):
        dense = AutoModelForCausalLM.from_config(MistralConfig())
        theirs = AutoModelForCausalLM.from_config(MixtralConfig(num_local_experts=2))
    assert sum(p.numel() for p in dense.parameters()) == 7_241_732_096
    opened = Weights(Path(), dict(dense.state_dict()), {})
    plan = planned_tensors(Upcycle(model="m"), dense.config, [opened], {})
    count = sum(tensor.shape.numel() for tensor in plan.values())
    assert all(tensor.shape.device.type == "meta" for tensor in plan.values())
    assert count == sum(p.numel() for p in theirs.parameters()) == 12_879_138_816


MEASURE = """
import resource, sys, torch
from pathlib import Path
from dominie.models.upcycling import Upcycle
from dominie.models.spec import Model
from dominie.models.upcycling import upcycle_model
import dominie.models.router_init, transformers.models.llama, accelerate, huggingface_hub
rows = [type("Row", (), {"input_ids": [1, 2, 3, 4], "supervised": [True] * 4})()] * 4
settings = Upcycle(model="m", noise=0.1, gate="hidden_states", source="s", tokens=16)
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
small, large, out = sys.argv[1:]
upcycle_model(settings, {"m": Model(path=small)}, Path(out) / "small", rows=rows)
before = peak()
upcycle_model(settings, {"m": Model(path=large)}, Path(out) / "large", rows=rows)
print(peak() - before)
"""


def test_memory_is_that_of_a_layer_beyond_the_input(tmp_path):
    wide = {**SIZES, "hidden_size": 512, "intermediate_size": 4096, "num_hidden_layers": 6}
    small = saved(tmp_path / "a", LlamaConfig(**SIZES))
    large = saved(tmp_path / "b", LlamaConfig(**wide))
    code = [sys.executable, "-c", MEASURE, small.path, large.path, str(tmp_path)]
    done = subprocess.run(code, capture_output=True, text=True, check=True, timeout=200)
    size = {n: sum(f.stat().st_size for f in Path(n).rglob("*.safetensors"))
            for n in (large.path, tmp_path / "large")}  # fmt: skip
    layer = size[large.path] / 6
    assert size[tmp_path / "large"] > 1.8 * size[large.path]
    # The input is mapped, so that pages of it count as well while they are wanted.
    assert float(done.stdout) < size[large.path] + layer


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (Gemma2Config(**SIZES, head_dim=8), "gemma2"),
        (MixtralConfig(**SIZES), "train the mixture as it is"),
        (LlamaConfig(**SIZES, attention_bias=True), "attention_bias: True"),
        (LlamaConfig(**SIZES, mlp_bias=True), "mlp_bias: True"),
        (Qwen3Config(**SIZES, use_sliding_window=True, max_window_layers=1), "use_sliding_window"),
    ],
    ids=["gemma2", "mixtral", "attention bias", "mlp bias", "windows of some layers"],
)
def test_what_has_no_mixture_is_refused(tmp_path, config, said):
    dense = saved(tmp_path / "dense", config)
    with pytest.raises(InputError, match=r"cannot be made|has nothing that does") as refused:
        made(tmp_path, dense)
    assert said in str(refused.value)
    assert not (tmp_path / "moe" / "config.json").exists()


def test_a_model_of_other_names_is_refused(tmp_path, mistral):
    file = Path(mistral.path) / "model.safetensors"
    tensors = load_file(file)
    save_file({name.removeprefix("model."): t for name, t in tensors.items()}, file)
    with pytest.raises(InputError, match="not where its family has them"):
        made(tmp_path, mistral)


def test_a_sibling_of_another_shape_is_refused(tmp_path, mistral):
    config = MistralConfig(**{**SIZES, "intermediate_size": 40})
    others = {"m": mistral, "s": saved(tmp_path / "other", config)}
    with pytest.raises(InputError, match="another shape") as refused:
        upcycle_model(Upcycle(model="m", siblings=["s"]), others, tmp_path / "moe")
    assert "mlp" in str(refused.value)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"experts": 1}, "at least 2"),
        ({"experts_per_token": 3}, "from 1 to 2"),
        ({"experts_per_token": 0}, "from 1 to 2"),
        ({"siblings": ["a", "b"]}, "need 3 experts"),
        ({"siblings": ["m"]}, "itself"),
        ({"noise": -0.1}, "noise"),
        ({"reset": 1.5}, "reset"),
        ({"gate_scale": 0.0}, "gate_scale"),
        ({"gate": "hidden_states"}, "needs a source"),
        ({"source": "general"}, "reads no source"),
        ({"gate": "hidden_states", "source": "s", "tokens": 1}, "tokens"),
        ({"seed": -1}, "seed"),
    ],
)
def test_settings_that_mean_nothing_are_refused(settings, said):
    with pytest.raises(ValueError, match=said):
        Upcycle(model="m", **settings)


@pytest.mark.parametrize("family", ["mistral", "llama", "qwen3"])
def test_the_mixture_of_a_pruned_model_says_which_layers_it_kept(family):
    dense = tiny_config(family, kept_layers=[0, 2], original_num_hidden_layers=4)
    mixture = mixture_of(dense, where="small").configuration(dense, experts=2, experts_per_token=1)
    read = type(mixture).from_dict(mixture.to_dict())
    assert (info_of(read).kept_layers, info_of(read).original_layers) == ((0, 2), 4)
    plain = mixture_of(dense, where="big").configuration(
        tiny_config(family), experts=2, experts_per_token=1
    )
    assert info_of(plain).kept_layers is None


def test_the_configuration_is_what_readers_of_mixtures_expect(tmp_path, mistral):
    written = json.loads((made(tmp_path, mistral) / "config.json").read_text())
    assert written["architectures"] == ["MixtralForCausalLM"]
    assert (written["num_local_experts"], written["num_experts_per_tok"]) == (2, 2)
    assert written["sliding_window"] == 5
    assert written["rms_norm_eps"] == MistralConfig().rms_norm_eps


def test_weights_that_are_not_finite_or_zeros_make_no_mixture(tmp_path):
    dense = tmp_path / "dense"
    AutoModelForCausalLM.from_config(DENSE["llama"]).save_pretrained(dense)
    models = {"d": Model(path=str(dense))}
    with pytest.raises(InputError, match=r"(?s)not be finite.*result in"):
        upcycle_model(Upcycle(model="d", noise=1e300), models, tmp_path / "noisy")
    tensors = load_file(dense / "model.safetensors")
    name = "model.layers.2.mlp.up_proj.weight"
    harmed = {**tensors, name: tensors[name].index_fill(0, torch.tensor([1]), float("nan"))}
    save_file(harmed, dense / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=f"(?s)not be finite.*d in {name}"):
        upcycle_model(Upcycle(model="d"), models, tmp_path / "harmed")
    nothing = {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}
    save_file(nothing, dense / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match="would be zeros"):
        upcycle_model(Upcycle(model="d", gate="zeros"), models, tmp_path / "nothing")
