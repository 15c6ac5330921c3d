"""Adapters on a head that is tied to the embedding: what is written is what was trained."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import SIZES, tiny_model
from transformers import AutoConfig, AutoModelForCausalLM

from dominie.core.errors import InputError
from dominie.models.adapters import config_under_lora, merged, shared_base
from dominie.models.head import decoder, output_head
from dominie.models.info import describe, info_of
from dominie.models.loading import load_frozen, load_student
from dominie.models.merging import Merge, merge_models
from dominie.models.spec import Model
from dominie.teachers import AdapterTeacher
from dominie.training.settings import Lora

GPT2 = {"vocab_size": 61, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64}
#: Families whose names for head and embedding differ.
TIED: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("lm_head", "embed_tokens", {**SIZES, "tie_word_embeddings": True}),
    "gpt2": ("lm_head", "wte", {**GPT2, "initializer_range": 0.3}),
    "bloom": ("lm_head", "word_embeddings", {**GPT2, "hidden_size": 16, "initializer_range": 0.3}),
}
IDS = torch.arange(1, 9)[None]


@pytest.fixture(scope="module")
def bases(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("tied")
    for family, (_, _, options) in TIED.items():
        torch.manual_seed(0)
        config = AutoConfig.for_model(family, **options)
        AutoModelForCausalLM.from_config(config).save_pretrained(folder / family)
    return {family: folder / family for family in TIED}


def moved(model: Any, seed: int = 1) -> Any:
    """The model as training would leave it: everything that learns has changed."""
    draw = torch.Generator().manual_seed(seed)
    for weight in model.parameters():
        if weight.requires_grad:
            weight.data += 0.3 * torch.randn(weight.shape, generator=draw)
    return model.eval()


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    """As the losses compute them: hidden states and head apart."""
    hidden = decoder(model)(input_ids=IDS, use_cache=False).last_hidden_state
    head = output_head(model)
    return torch.nn.functional.linear(hidden, head.weight, head.bias)


def written(model: Any, folder: Path, *, merge: bool) -> Path:
    """What `save_model` of a stage writes."""
    if not merge:
        model.save_pretrained(folder)
        return folder
    plain, state = merged(model)
    tied = plain.all_tied_weights_keys
    state = {name: tensor for name, tensor in state.items() if tied.get(name) not in state}
    plain.save_pretrained(folder, state_dict=state)
    return folder


def adapted(case: str, head: str, table: str) -> dict[str, Any]:
    return {
        "head in full": {"modules_to_save": [head]},
        "embedding in full": {"modules_to_save": [table]},
        "both in full": {"modules_to_save": [head, table]},
        "head": {"target_modules": [head]},
        "embedding": {"target_modules": [table]},
        "an expression": {"target_modules": f".*({head}|{table})"},
        "one of each": {"target_modules": [table], "modules_to_save": [head]},
    }[case]


CASES = (
    "head in full",
    "embedding in full",
    "both in full",
    "head",
    "embedding",
    "an expression",
    "one of each",
)


@pytest.mark.parametrize("merge", [True, False])
@pytest.mark.parametrize(
    ("family", "case"),
    [
        *(("llama", case) for case in CASES),
        *((family, "an expression") for family in ("gpt2", "bloom")),
        *(
            pytest.param(family, case, marks=pytest.mark.full)
            for family in ("gpt2", "bloom")
            for case in CASES
            if case != "an expression"
        ),
    ],
)
@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`")
def test_what_is_written_computes_what_was_trained(bases, tmp_path, family, case, merge):
    head, table, _ = TIED[family]
    lora = Lora(r=4, alpha=8, merge=merge, **adapted(case, head, table))
    student = moved(load_student(Model(path=str(bases[family])), lora=lora))
    trained = logits(student)
    folder = written(student, tmp_path / "out", merge=merge)
    close = {"rtol": 1e-4, "atol": 1e-4}
    torch.testing.assert_close(logits(load_frozen(Model(path=str(folder)))), trained, **close)
    if merge:
        plain, found = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
        assert not any(found.values())
        torch.testing.assert_close(logits(plain.eval()), trained, **close)
    else:
        on = load_student(Model(path=str(folder)), lora=lora).eval()
        torch.testing.assert_close(logits(on), trained, **close)


def test_adapters_elsewhere_leave_one_weight(bases, tmp_path):
    for lora in (Lora(r=2), Lora(r=2, target_modules=["q_proj"]), None):
        student = load_student(Model(path=str(bases["llama"])), lora=lora)
        config = describe(Model(path=str(bases["llama"]))).config
        assert config_under_lora(config, lora) is config
        if lora is None:
            continue
        folder = written(moved(student), tmp_path / "out", merge=True)
        assert json.loads((folder / "config.json").read_text())["tie_word_embeddings"]
        shutil.rmtree(folder)
    untied = config_under_lora(config, Lora(r=2, target_modules=".*lm_head"))
    assert (config.tie_word_embeddings, untied.tie_word_embeddings) == (True, False)


def test_weights_shared_by_other_modules_are_refused(bases, monkeypatch):
    model = tiny_model("llama")
    first, second = model.model.layers
    second.mlp.up_proj.weight = first.mlp.up_proj.weight
    monkeypatch.setattr("dominie.models.loading._load", lambda *_, **__: model)
    with pytest.raises(InputError, match=r"(?s)several modules share.*layers\.0\.mlp\.up_proj"):
        load_student(Model(path=str(bases["llama"])), lora=Lora(r=2))


@pytest.mark.parametrize("method", ["linear", "task_arithmetic"])
@pytest.mark.parametrize("first", ["tied", "untied"])
def test_a_tied_and_an_untied_model_merge_into_an_untied_one(bases, tmp_path, first, method):
    lora = Lora(r=4, modules_to_save=["lm_head"])
    student = moved(load_student(Model(path=str(bases["llama"])), lora=lora))
    models = {
        "tied": Model(path=str(bases["llama"])),
        "untied": Model(path=str(written(student, tmp_path / "untied", merge=True))),
    }
    names = sorted(models, key=lambda name: name != first)
    weights = {"linear": dict.fromkeys(names, 1.0), "task_arithmetic": {names[1]: 0.5}}[method]
    base = first if method == "task_arithmetic" else None
    merge_models(Merge(models=weights, method=method, base=base), models, tmp_path / "out")
    one, other = (AutoModelForCausalLM.from_pretrained(models[n].path) for n in names)
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    assert not torch.equal(found["lm_head.weight"], found["model.embed_tokens.weight"])
    for name, tensor in found.items():
        expected = 0.5 * one.state_dict()[name] + 0.5 * other.state_dict()[name]
        torch.testing.assert_close(tensor, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("teacher", "student", "shares"),
    [
        ({"modules_to_save": ["lm_head"]}, {"modules_to_save": ["lm_head"]}, True),
        ({"modules_to_save": ["lm_head"]}, {}, True),
        ({"target_modules": ["lm_head"]}, {"modules_to_save": ["embed_tokens"]}, True),
        ({"target_modules": ["lm_head"]}, {"modules_to_save": ["lm_head"]}, False),
        ({"modules_to_save": ["embed_tokens"]}, {"target_modules": ".*embed_tokens"}, False),
        ({"modules_to_save": ["o_proj"]}, {}, False),
    ],
)
@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`")
def test_a_teacher_over_the_same_base_stays_what_it_was(bases, tmp_path, teacher, student, shares):
    """A module is trained in full by one and adapted by the other: each has its own base."""
    base = Model(path=str(bases["llama"]))
    theirs = Lora(r=3, merge=False, **{"target_modules": ["q_proj"]} | teacher)
    folder = written(moved(load_student(base, lora=theirs)), tmp_path / "teacher", merge=False)
    mine = Lora(r=3, **student)
    known = {"teacher": describe(Model(path=str(folder)))}
    found = shared_base(describe(base), known, lora=mine, precision="fp32")
    assert set(found.adapters) == ({"teacher"} if shares else set())
    if not shares:
        assert "in full" in found.apart["teacher"]
        return
    model = moved(load_student(base, lora=mine), seed=2)
    before = logits(model)
    beside = AdapterTeacher(model, str(folder))
    with beside.activated() as active:
        expected = logits(load_frozen(Model(path=str(folder))))
        torch.testing.assert_close(logits(active), expected, rtol=1e-4, atol=1e-4)
    with AdapterTeacher(model).activated() as alone:
        torch.testing.assert_close(logits(alone), logits(load_frozen(base)), rtol=1e-4, atol=1e-4)
    out = written(model.eval(), tmp_path / "out", merge=True)
    torch.testing.assert_close(
        logits(load_frozen(Model(path=str(out)))), before, rtol=1e-4, atol=1e-4
    )


def test_the_planner_counts_the_second_weight(bases):
    from dominie.planning.sizes import training_flops
    from dominie.planning.trace import Pass, traced

    config = describe(Model(path=str(bases["llama"]))).config
    run = {"rows": 1, "length": 4, "dtype": "fp32", "trained": True}
    less = traced(config, Pass(lora=Lora(r=2), **run)).parameters
    more = traced(config, Pass(lora=Lora(r=2, modules_to_save=["lm_head"]), **run)).parameters
    table = info_of(config).vocabulary * info_of(config).hidden_size
    assert more - less == 2 * table, "one that is frozen, one that learns"
    assert training_flops(config, Lora(r=2, modules_to_save=["lm_head"])).head_trained
