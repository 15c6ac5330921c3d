"""The toy models are ordinary Hugging Face folders that share one tokenizer."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from dominie.toyworld import materialise
from dominie.toyworld.toy_models import MODELS, toy_config, untrained_model

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("toyworld")
    return {kind: materialise(f"toyworld:{kind}", folder) for kind in MODELS}


def test_both_models_have_the_same_tokenizer(folders: dict[str, Path]) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        teacher, student = ((folders[kind] / name).read_bytes() for kind in MODELS)
        assert teacher == student


def test_layers_and_heads_map_one_to_one(folders: dict[str, Path]) -> None:
    teacher, student = (AutoModelForCausalLM.from_pretrained(folders[kind]) for kind in MODELS)
    assert teacher.config.model_type == "mixtral"
    assert student.config.model_type == "mistral"
    for key in ("num_hidden_layers", "num_attention_heads", "vocab_size", "rope_parameters"):
        assert getattr(teacher.config, key) == getattr(student.config, key)
    assert teacher.num_parameters() > 2 * student.num_parameters()


def test_wider_and_deeper_models_still_map_one_to_one(tmp_path: Path) -> None:
    size = "?width=320&layers=2"
    both = [
        AutoModelForCausalLM.from_pretrained(materialise(f"toyworld:{kind}{size}", tmp_path)).config
        for kind in MODELS
    ]
    for config in both:
        assert (config.hidden_size, config.num_hidden_layers) == (320, 2)
        assert (config.num_attention_heads, config.num_key_value_heads) == (5, 2)


def test_a_student_of_1024_by_12_has_a_hundred_million_parameters() -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(toy_config("student", width=1024, layers=12))
    assert 100e6 < model.num_parameters() < 120e6


@pytest.mark.parametrize("data", ["general", "domain"])
def test_text_survives_the_tokenizer(folders: dict[str, Path], tmp_path: Path, data: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folders["student"])
    lines = materialise(f"toyworld:{data}?rows=300", tmp_path).read_text().splitlines()
    for line in lines:
        messages = json.loads(line)["messages"]
        ids = tokenizer.apply_chat_template(messages, return_dict=False)
        assert len(ids) <= 25
        assert tokenizer.unk_token_id not in ids
        words = " ".join(message["content"] for message in messages)
        assert tokenizer.decode(ids, skip_special_tokens=True) == words


def test_a_prompt_is_the_beginning_of_its_conversation(folders: dict[str, Path]) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folders["student"])
    user = {"role": "user", "content": "say tea 4 2"}
    reply = {"role": "assistant", "content": "tea 4 2"}
    prompt = tokenizer.apply_chat_template([user], add_generation_prompt=True, tokenize=False)
    assert prompt == "<s><|user|>say tea 4 2<|end|><|assistant|>"
    whole = tokenizer.apply_chat_template([user, reply], tokenize=False)
    assert whole == f"{prompt}tea 4 2<|end|>"


def test_a_role_the_world_lacks_is_refused(folders: dict[str, Path]) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folders["student"])
    with pytest.raises(Exception, match="knows the roles"):
        tokenizer.apply_chat_template([{"role": "tool", "content": "tea"}])


def test_generation_ends_with_the_turn(folders: dict[str, Path]) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folders["student"])
    config = GenerationConfig.from_pretrained(folders["student"])
    assert tokenizer.convert_tokens_to_ids("<|end|>") == config.eos_token_id
    assert tokenizer.pad_token_id == config.pad_token_id != config.eos_token_id


def test_making_a_model_leaves_the_random_state_alone() -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    untrained_model("student", seed=9)
    assert torch.equal(torch.rand(3), expected)
