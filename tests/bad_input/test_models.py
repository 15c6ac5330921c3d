"""Models that are incomplete, cannot be trained, or do not fit each other."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

TAUGHT = "{s: {student: m, teacher: t, data: {d: 1.0}, loss: {attention: 1.0, prediction: 1.0}}}"


def without(name: str) -> Callable[[Path], object]:
    return lambda model: (model / name).unlink()


def cut(name: str) -> Callable[[Path], object]:
    def edit(model: Path) -> None:
        whole = (model / name).read_bytes()
        (model / name).write_bytes(whole[: len(whole) // 2])

    return edit


def configured(**values: object) -> Callable[[Path], object]:
    def edit(model: Path) -> None:
        config = json.loads((model / "config.json").read_text())
        (model / "config.json").write_text(json.dumps({**config, **values}))

    return edit


def reweighed(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], object]:
    def edit(model: Path) -> None:
        weights = load_file(model / "model.safetensors")
        change(weights)
        save_file(weights, model / "model.safetensors", metadata={"format": "pt"})

    return edit


def pickled(model: Path) -> None:
    torch.save(load_file(model / "model.safetensors"), model / "pytorch_model.bin")
    (model / "model.safetensors").unlink()


QUERY = "model.layers.0.self_attn.q_proj.weight"
NORM = "model.norm.weight"


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (without("config.json"), ["no config.json"]),
        (without("model.safetensors"), ["no model.safetensors"]),
        (without("tokenizer.json"), ["no tokenizer.json"]),
        (without("chat_template.jinja"), ["no chat template", "chat_template: FILE.jinja"]),
        (cut("model.safetensors"), ["cannot be loaded", "SafetensorError"]),
        (cut("tokenizer.json"), ["the tokenizer cannot be loaded"]),
        (cut("config.json"), ["cannot be loaded", "config.json"]),
        (configured(model_type="zorp"), ["zorp"]),
        (configured(num_attention_heads="four"), ["num_attention_heads"]),
        (configured(num_hidden_layers=4), ["weights that its files lack", "model.layers.3"]),
        (configured(num_hidden_layers=2), ["no place for", "model.layers.2"]),
        (configured(hidden_size=64), ["another shape", "embed_tokens"]),
        (configured(vocab_size=100), ["the tokenizer knows tokens that the model does not"]),
        (reweighed(lambda w: w.pop(QUERY)), ["weights that its files lack", QUERY]),
        (reweighed(lambda w: w.update(extra=torch.zeros(2))), ["no place for", "extra"]),
        (reweighed(lambda w: w[NORM].fill_(float("nan"))), ["logits are not finite"]),
        (pickled, ["pickled", "pytorch_model.bin", "save_pretrained"]),
    ],
)
def test_a_model_s_folder_that_is_incomplete(refused, work, dominie, edit, words):
    edit(work / "m")
    refused(dominie("run", "r.yaml"), *words)
    assert not list((work / "runs").glob("*/s/model"))


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["stages.s.student=d.jsonl"], ["not a model's folder", "a file"]),
        (["stages.s.student=runs"], ["no config.json", "an empty folder"]),
        (["stages.s.student=./gone"], ["no such folder"]),
        (["stages.s.student=nobody/none"], ["nobody/none", "the network"]),
        (["stages.s.student=toyworld:studnt"], ["did you mean toyworld:student?"]),
        (["models.q={path: m, quantize: 8bit}", "stages.s.student=q"], ["train.lora"]),
        (["models.q={path: m, adapter: runs}", "stages.s.student=q"], ["the adapter cannot"]),
        (
            ["train.lora.target_modules=[nope]"],
            ["LoRA is to go on a module that the model has not", "q_proj"],
        ),
    ],
)
def test_a_model_that_cannot_be_trained(refused, work, dominie, overrides, words):
    (work / "runs").mkdir()
    refused(dominie("run", "r.yaml", *overrides, "--runs", "elsewhere"), *words)


@pytest.mark.skipif(find_spec("bitsandbytes") is not None, reason="bitsandbytes is installed")
def test_quantisation_needs_its_package(refused, work, dominie):
    overrides = ["models.q={path: m, quantize: 4bit}", "stages.s.student=q", "train.lora.r=2"]
    refused(dominie("run", "r.yaml", *overrides), "needs bitsandbytes")


def renamed(model: Path) -> None:
    """The same number of tokens, two of which have changed places."""
    whole = json.loads((model / "tokenizer.json").read_text())
    ids = whole["model"]["vocab"]
    one, other = sorted(ids)[-2:]
    ids[one], ids[other] = ids[other], ids[one]
    (model / "tokenizer.json").write_text(json.dumps(whole))


def remade(**sizes: int) -> Callable[[Path], object]:
    def edit(model: Path) -> None:
        from transformers import AutoConfig, AutoModelForCausalLM

        config = AutoConfig.from_pretrained(model)
        for name, size in sizes.items():
            setattr(config, name, size)
        AutoModelForCausalLM.from_config(config).save_pretrained(model)

    return edit


@pytest.mark.parametrize(
    ("edit", "overrides", "words"),
    [
        (renamed, [], ["disagree on what token ids mean", "2 ids differ"]),
        (remade(num_hidden_layers=4), [], ["differ in depth", "set layers: uniform"]),
        (remade(num_attention_heads=6, num_key_value_heads=3), [], ["4 heads", "attention: 0"]),
        (remade(max_position_embeddings=32), [], ["t: conversations are longer", "at most 32"]),
        (remade(), ["stages.s.loss.attention={layers: [[0, 9]]}"], ["does not exist", "[0, 9]"]),
        (remade(), ["stages.s.loss.attention={layers: alle}"], ["not a mapping of layers"]),
    ],
)
def test_a_teacher_that_does_not_fit(refused, work, dominie, edit, overrides, words):
    shutil.copytree(work / "m", work / "t")
    edit(work / "t")
    refused(dominie("check", "r.yaml", f"stages={TAUGHT}", *overrides), *words)


def test_a_teacher_with_the_same_tokens_in_another_order_can_be_mapped(refused, work, dominie):
    shutil.copytree(work / "m", work / "t")
    renamed(work / "t")
    taught = f"stages={TAUGHT.replace('teacher: t', 'teacher: other')}"
    refused(dominie("check", "r.yaml", taught, "models={other: t}"), "map_tokens: true")
    mapped = dominie("run", "r.yaml", taught, "models={other: {path: t, map_tokens: true}}")
    assert mapped.status == 0, mapped.err
    changed = json.loads((work / "t" / "tokenizer.json").read_text())
    changed["model"]["vocab"]["<new>"] = changed["model"]["vocab"].pop("red")
    (work / "t" / "tokenizer.json").write_text(json.dumps(changed))
    other = "models={other: {path: t, map_tokens: true}}"
    refused(dominie("check", "r.yaml", taught, other), "'<new>', 'red'")


def test_agreement_with_a_teacher_of_other_tokens(refused, work, dominie):
    shutil.copytree(work / "m", work / "t")
    renamed(work / "t")
    task = "evaluate.tasks.a={source: d, metric: agreement, teacher: t}"
    refused(dominie("check", "r.yaml", task), "evaluate.tasks.a", "disagree")


def test_attention_that_cannot_be_compared_is_named(refused, work, dominie):
    from transformers import Gemma2Config, Gemma2ForCausalLM

    shutil.copytree(work / "m", work / "t")
    sizes = json.loads((work / "m" / "config.json").read_text())
    keys = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "eos_token_id")
    config = Gemma2Config(**{key: sizes[key] for key in keys}, head_dim=24, intermediate_size=32)
    Gemma2ForCausalLM(config).save_pretrained(work / "t")
    for verb in ("check", "run"):
        refused(dominie(verb, "r.yaml", f"stages={TAUGHT}"), "soft-capped", "set attention: 0")
