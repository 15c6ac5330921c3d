"""Models from folders: frozen or ready to train, plain or under adapters."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from tiny import tiny_folder, tiny_model
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedTokenizerFast,
)

from dominie.core.errors import InputError
from dominie.models.loading import load_config, load_frozen, load_student, load_tokenizer
from dominie.models.spec import Model
from dominie.planning.sizes import load_plan_config
from dominie.toyworld.toy_models import word_tokenizer
from dominie.training.settings import Lora

IDS = torch.tensor([[5, 9, 2, 31, 7]])


@pytest.fixture(scope="session")
def saved(tmp_path_factory) -> Path:
    """A tiny model in bf16 with a tokenizer."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    torch.manual_seed(0)
    tiny_model("mistral", vocab_size=400, dtype=torch.bfloat16).save_pretrained(folder)
    word_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def folder(saved, tmp_path) -> Path:
    return shutil.copytree(saved, tmp_path / "tiny")


@pytest.fixture(scope="session")
def adapter(saved) -> Path:
    """An adapter over `saved` whose every matrix is random."""
    torch.manual_seed(1)
    base = AutoModelForCausalLM.from_pretrained(saved, dtype=torch.float32)
    config = LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(base, config)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.5)
    model.save_pretrained(saved.parent / "adapter")
    return saved.parent / "adapter"


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits.float()


def test_a_student_is_held_in_fp32_with_every_weight_trainable(saved):
    student = load_student(Model(path=str(saved)))
    assert student.training
    assert all(p.requires_grad and p.dtype == torch.float32 for p in student.parameters())


def test_a_frozen_model_has_the_checkpoint_s_dtype_or_the_one_asked_for(saved):
    frozen = load_frozen(Model(path=str(saved)))
    assert not frozen.training
    assert not any(p.requires_grad for p in frozen.parameters())
    assert {p.dtype for p in frozen.parameters()} == {torch.bfloat16}
    wide = load_frozen(Model(path=str(saved), dtype="fp32"))
    assert {p.dtype for p in wide.parameters()} == {torch.float32}


def test_weights_are_those_of_the_folder(saved):
    frozen = load_frozen(Model(path=str(saved)))
    on_disk = load_file(saved / "model.safetensors")
    held = frozen.state_dict()
    assert on_disk.keys() <= held.keys()
    assert all(torch.equal(held[name], tensor) for name, tensor in on_disk.items())


def test_the_attention_implementation_is_transformers_choice_or_the_one_asked_for(saved):
    assert load_frozen(Model(path=str(saved))).config._attn_implementation == "sdpa"
    eager = load_frozen(Model(path=str(saved), attention="eager"))
    assert eager.config._attn_implementation == "eager"
    with pytest.raises(InputError, match="sparkling"):
        load_frozen(Model(path=str(saved), attention="sparkling"))


@pytest.mark.parametrize(
    ("precision", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16)]
)
def test_lora_freezes_the_base_in_the_run_s_precision(saved, precision, dtype):
    student = load_student(Model(path=str(saved)), lora=Lora(r=2), precision=precision)
    trainable = {n: p for n, p in student.named_parameters() if p.requires_grad}
    frozen = [p for p in student.parameters() if not p.requires_grad]
    assert trainable
    assert all("lora_" in name for name in trainable)
    assert {p.dtype for p in trainable.values()} == {torch.float32}
    assert {p.dtype for p in frozen} == {dtype}


@pytest.mark.parametrize(
    "names", [{"target_modules": ["q_proj", "v_pro"]}, {"modules_to_save": ["lm_hed"]}]
)
def test_lora_refuses_a_name_that_no_module_has(saved, names):
    with pytest.raises(
        InputError, match=r"a module that the model has not(?s:.*)did you mean (v_proj|lm_head)"
    ):
        load_student(Model(path=str(saved)), lora=Lora(r=2, **names))


def test_gradient_checkpointing_is_without_reentrance(saved):
    student = load_student(Model(path=str(saved)), gradient_checkpointing=True)
    assert student.is_gradient_checkpointing
    loss = student(input_ids=IDS, labels=IDS).loss
    loss.backward()
    assert all(p.grad is not None for p in student.parameters())


def test_an_adapter_is_a_model_wherever_its_base_is_named(saved, adapter):
    base = logits(load_frozen(Model(path=str(saved), dtype="fp32")))
    by_folder = load_frozen(Model(path=str(adapter), dtype="fp32"))
    by_name = load_frozen(Model(path=str(saved), adapter=str(adapter), dtype="fp32"))
    torch.testing.assert_close(logits(by_folder), logits(by_name))
    assert (logits(by_folder) - base).abs().max() > 0.1
    weights = load_file(adapter / "adapter_model.safetensors")
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_{}.weight"
    delta = 8 / 2 * weights[name.format("B")] @ weights[name.format("A")]
    plain = load_frozen(Model(path=str(saved), dtype="fp32")).state_dict()
    merged = by_folder.state_dict()["model.layers.0.self_attn.q_proj.weight"]
    expected = plain["model.layers.0.self_attn.q_proj.weight"] + delta
    torch.testing.assert_close(merged, expected)


def test_an_adapter_can_learn_on_as_a_whole_model(adapter):
    student = load_student(Model(path=str(adapter)))
    assert all(p.requires_grad for p in student.parameters())
    student(input_ids=IDS, labels=IDS).loss.backward()


def test_an_adapter_has_the_tokenizer_and_configuration_of_its_base(saved, adapter):
    assert not (adapter / "tokenizer.json").exists()
    spec = Model(path=str(adapter))
    assert load_tokenizer(spec).get_vocab() == word_tokenizer().get_vocab()
    assert load_config(spec).hidden_size == 16


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("num_hidden_layers", 10**7),
        ("num_hidden_layers", 1e9),
        ("num_local_experts", 10**8),
        ("hidden_size", 10**12),
        ("vocab_size", 2**40),
        ("layer_types", ["x"] * 210_000),
        ("text_config", {"num_hidden_layers": 10**400}),
    ],
)
def test_a_configuration_that_no_memory_holds_is_refused_before_it_is_built(
    folder, monkeypatch, key, value
):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {key: value}))
    monkeypatch.setattr(AutoConfig, "from_pretrained", lambda *_, **__: pytest.fail("built"))
    for load in (load_config, load_plan_config, load_frozen):
        with pytest.raises(InputError, match="a model that nobody can load") as refused:
            load(Model(path=str(folder)))
        assert refused.value.where.startswith(str(folder))
        assert refused.value.where.endswith(key if key != "text_config" else "num_hidden_layers")


def test_a_hostile_tokenizer_in_a_models_folder_is_refused_by_name(folder, monkeypatch):
    file = folder / "tokenizer.json"
    raw = json.loads(file.read_text())
    raw["normalizer"] = {"type": "Prepend", "prepend": "x" * 10**6}
    file.write_text(json.dumps(raw))
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", lambda *_, **__: pytest.fail("loaded"))
    with pytest.raises(InputError, match="cannot be used safely") as refused:
        load_tokenizer(Model(path=str(folder)))
    assert refused.value.where == str(folder)


def test_a_slow_tokenizer_is_refused(saved, monkeypatch):
    slow = type("Slow", (), {"is_fast": False})
    for loader in (AutoTokenizer, PreTrainedTokenizerFast):
        monkeypatch.setattr(loader, "from_pretrained", lambda *_, **__: slow())
    with pytest.raises(InputError, match=r"(?s)slow tokenizer.*Slow"):
        load_tokenizer(Model(path=str(saved)))


@pytest.mark.parametrize("kind", [type("Slow", (), {"is_fast": False}), type("NoFlag", (), {})])
def test_a_tokenizer_without_positions_gives_way_to_the_file_beside_it(saved, monkeypatch, kind):
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", lambda *_, **__: kind())
    assert load_tokenizer(Model(path=str(saved))).get_vocab() == word_tokenizer().get_vocab()


def test_mistral_commons_file_beside_a_model_is_not_read(folder):
    """tekken.json would make transformers choose a class without chat template and positions."""
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "mistral"}))
    (folder / "tekken.json").write_text("{}")
    assert load_tokenizer(Model(path=str(folder))).get_vocab() == word_tokenizer().get_vocab()
    (folder / "tokenizer.json").unlink()
    with pytest.raises(InputError, match=r"(?s)no tokenizer.json.*beside tekken.json"):
        load_tokenizer(Model(path=str(folder)))


@pytest.mark.parametrize("load", [load_student, load_frozen])
def test_weights_that_are_missing_are_not_drawn_at_random(folder, load):
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"(?s)lack.*layers\.1\.mlp\.up_proj"):
        load(Model(path=str(folder)))


def test_an_adapter_that_lacks_matrices_is_refused(saved, adapter, tmp_path):
    cut = shutil.copytree(adapter, tmp_path / "cut")
    weights = load_file(cut / "adapter_model.safetensors")
    weights.pop(min(weights))
    save_file(weights, cut / "adapter_model.safetensors")
    with pytest.raises(InputError, match="missing adapter keys"):
        load_frozen(Model(path=str(cut)))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "cannot be read"),
        ("[]", "cannot be read"),
        ("{}", "cannot be read"),
        ('{"base_model_name_or_path": null}', "does not say which model"),
        ('{"base_model_name_or_path": "/gone"}', "not a model's folder"),
    ],
)
def test_an_adapter_without_its_base_is_refused(adapter, tmp_path, text, words):
    lost = shutil.copytree(adapter, tmp_path / "lost")
    (lost / "adapter_config.json").write_text(text)
    with pytest.raises(InputError, match=words):
        load_frozen(Model(path=str(lost)))


def test_no_code_comes_with_a_model(folder):
    config = json.loads((folder / "config.json").read_text())
    code = folder / "code.py"
    code.write_text("raise SystemExit('the model ran its own code')")
    config |= {"model_type": "own", "auto_map": {"AutoConfig": "code.Config"}}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="needs Python code"):
        load_frozen(Model(path=str(folder)))


def indexed(folder, name):
    (folder / "model.safetensors").rename(folder / "part.safetensors")
    index = {"metadata": {}, "weight_map": {"lm_head.weight": name}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("../outside.safetensors", "names a file"),
        ("/etc/outside.safetensors", "names a file"),
        ("pytorch_model.bin", "names a file"),
        (3, "cannot be read"),
    ],
)
def test_an_index_that_leads_to_other_files_is_refused(tmp_path, name, said):
    folder = tiny_folder(tmp_path / "m")
    indexed(folder, name)
    with pytest.raises(InputError, match=f"the index of the weights {said}"):
        load_student(Model(path=str(folder)))


@pytest.mark.parametrize("declared", [False, True])
def test_a_pickled_adapter_is_refused(tmp_path, declared):
    base, adapter = tiny_folder(tmp_path / "m"), tmp_path / "a"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(
        json.dumps({"base_model_name_or_path": str(base), "peft_type": "LORA"})
    )
    (adapter / "adapter_model.bin").write_bytes(b"")
    spec = Model(path=str(base), adapter=str(adapter)) if declared else Model(path=str(adapter))
    with pytest.raises(InputError, match=r"(?s)pickled.*adapter_model\.bin"):
        load_student(spec)
