"""A tokenizer is somebody's too: a child process loads it first, and may be lost over it."""

import json
import os

import pytest

from dominie.core.errors import InputError
from dominie.data import trial_process as module
from dominie.data.trial_process import check_tokenizer
from dominie.toyworld.toy_models import word_tokenizer


def replacing(pattern, content, kind="String"):
    return {"type": "Replace", "pattern": {kind: pattern}, "content": content}


def doubling(letter):
    return {"type": "Sequence", "normalizers": [replacing(letter, 2 * letter)] * 60}


@pytest.fixture
def tried(tmp_path, monkeypatch):
    """Save a tokenizer with other parts, and have it tried."""
    monkeypatch.setattr(module, "_tried", {})
    monkeypatch.setattr(module, "LOADING_SECONDS", 1.0)
    good = json.loads(word_tokenizer().backend_tokenizer.to_str())
    path = tmp_path / "tokenizer.json"

    def attempt(**parts):
        path.write_text(json.dumps({**good, **parts}))
        check_tokenizer("a model", None, path)

    attempt.good = good
    yield attempt
    module.trial.close()


@pytest.mark.parametrize(
    ("part", "value", "found"),
    [
        ("normalizer", doubling("a"), "it "),
        ("normalizer", doubling("☃"), "it "),
        ("normalizer", replacing("q", "q" * 10**6), "its normaliser makes 1,000,094 characters"),
        ("normalizer", replacing("(a+)+$", "b", "Regex"), "Panic"),
        ("padding", {"strategy": {"Fixed": 10**12}}, "it ended the process"),
        ("vocab", 10**9, "the id 1,000,000,000"),
        ("vocab", 2**32 - 1, "the id 4,294,967,295"),
    ],
)
def test_a_hostile_tokenizer_is_refused_and_this_process_lives(tried, part, value, found):
    if part == "padding":
        value |= {"direction": "Right", "pad_to_multiple_of": None, "pad_id": 0, "pad_type_id": 0}
        value |= {"pad_token": "<pad>"}
    if part == "vocab":
        vocabulary = {**tried.good["model"]["vocab"], "zz": value}
        part, value = "model", {**tried.good["model"], "vocab": vocabulary}
    for _ in range(2):
        with pytest.raises(InputError, match="cannot be used safely") as refused:
            tried(**{part: value})
        assert refused.value.where == "a model"
        assert refused.value.found.startswith(found)
    tried()


def test_what_is_no_tokenizer_is_left_to_the_loader(tried):
    tried(model=7)


def test_a_tokenizer_is_tried_once_for_its_content(tried, monkeypatch):
    tried()
    monkeypatch.setattr(module.trial, "ask", lambda *a: pytest.fail("tried again"))
    tried()


def test_without_a_child_nothing_is_tried(tried, monkeypatch):
    module.trial.close()
    monkeypatch.setattr("sys.executable", "/nowhere/python")
    tried(normalizer=doubling("a"))


@pytest.mark.full
def test_a_folder_without_tokenizer_json_is_tried_as_transformers_loads_it(monkeypatch, tmp_path):
    monkeypatch.setattr(module, "_tried", {})
    (tmp_path / "vocab.json").write_text(json.dumps({"a": 0, "b": 4294967295, "<|endoftext|>": 1}))
    (tmp_path / "merges.txt").write_text("#version: 0.2\n")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    with pytest.raises(InputError, match="cannot be used safely") as refused:
        check_tokenizer(str(tmp_path), None, None)
    assert "the id 4,294,967,295" in refused.value.found
    module.trial.close()


def test_a_child_of_the_process_that_forked_is_not_asked(tried, monkeypatch):
    tried()
    first = module.trial._process
    monkeypatch.setattr(module.trial, "_owner", os.getpid() + 1)
    tried(normalizer=replacing("q", "k"))
    assert module.trial._process is not first
    assert first.poll() is None
    first.kill()
    first.wait()
