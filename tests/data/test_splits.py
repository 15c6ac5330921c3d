import json
from collections import Counter

import pytest

from dominie.core.errors import InputError
from dominie.data.conversations import Conversation
from dominie.data.sources import (
    Source,
    conversation_digest,
    held_out_prompts,
    prompt_digest,
    read_split,
    split_of_prompt,
    without_duplicates,
)


def chat(*contents, first="user", tools=None):
    roles = ["user", "assistant"] if first == "user" else ["assistant", "user"]
    return Conversation(
        [{"role": roles[i % 2], "content": text} for i, text in enumerate(contents)], tools
    )


def source(path="x.jsonl", **options):
    return Source(name="x", path=str(path), **options)


def test_a_prompt_is_what_stands_before_the_first_answer():
    assert prompt_digest(chat("q", "a")) == prompt_digest(chat("q", "b", "more", "c"))
    assert prompt_digest(chat("q", "a")) != prompt_digest(chat("r", "a"))
    assert prompt_digest(chat("q", "a")) != prompt_digest(chat("q", "a", tools=[{"name": "t"}]))


def test_white_space_makes_no_other_prompt_but_another_conversation():
    assert prompt_digest(chat("two  words\n", "a")) == prompt_digest(chat("two words", "a"))
    assert conversation_digest(chat("two  words", "a")) != conversation_digest(
        chat("two words", "a")
    )


def test_a_greeting_is_no_answer():
    one = chat("Hello! How can I help?", "q1", "a1", first="assistant")
    two = chat("Hello! How can I help?", "q2", "a2", first="assistant")
    assert prompt_digest(one) != prompt_digest(two)


def test_without_a_user_the_conversation_is_its_own_prompt():
    system = {"role": "system", "content": "Write."}
    one = Conversation([system, {"role": "assistant", "content": "A poem."}])
    two = Conversation([system, {"role": "assistant", "content": "A story."}])
    assert prompt_digest(one) != prompt_digest(two)


def test_fractions_are_met_and_nested():
    digests = [prompt_digest(chat(f"q{i}", "a")) for i in range(4000)]
    small = source(test_fraction=0.1, validation_fraction=0.05)
    large = source(test_fraction=0.2, validation_fraction=0.05)
    counts = Counter(split_of_prompt(d, small) for d in digests)
    assert counts["test"] == pytest.approx(400, abs=80)
    assert counts["validation"] == pytest.approx(200, abs=60)
    in_small = {d for d in digests if split_of_prompt(d, small) == "test"}
    in_large = {d for d in digests if split_of_prompt(d, large) == "test"}
    assert in_small < in_large


def test_the_split_of_a_prompt_never_changes():
    # Known answers: a run resumed years later has to hold out the same prompts.
    some = source(test_fraction=0.4, validation_fraction=0.3)
    splits = [split_of_prompt(prompt_digest(chat(f"q{i}", "a")), some) for i in range(8)]
    assert splits[:4] == ["test", "train", "train", "validation"]
    assert splits[4:] == ["validation", "test", "train", "test"]


@pytest.mark.parametrize("split", ["validation", "test"])
def test_a_fraction_of_one_holds_out_everything(split):
    everything = source(**{f"{split}_fraction": 1.0})
    assert split_of_prompt(b"\xff" * 16, everything) == split
    assert split_of_prompt(b"\x00" * 16, everything) == split


def test_a_fraction_of_zero_holds_out_nothing():
    assert split_of_prompt(b"\x00" * 16, source()) == "train"
    assert split_of_prompt(b"\xff" * 16, source()) == "train"


def test_duplicates_are_told_by_messages_and_tools_alone():
    rows = [
        Conversation([{"role": "assistant", "content": "a"}], None, "x:1", {"id": 1}),
        Conversation([{"content": "a", "role": "assistant"}], None, "x:2", {"id": 2}),
        Conversation([{"role": "assistant", "content": "a"}], [{"name": "t"}], "x:3"),
    ]
    assert list(without_duplicates(rows)) == [rows[0], None, rows[2]]


@pytest.fixture
def path(tmp_path):
    rows = [{"prompt": f"q{i % 200}", "completion": f"a{i % 300}"} for i in range(700)]
    path = tmp_path / "x.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def test_splits_are_disjoint_in_prompts_and_complete_without_duplicates(path):
    some = source(path, validation_fraction=0.3, test_fraction=0.3)
    parts = {split: read_split(some, split) for split in ("train", "validation", "test")}
    assert sum(map(len, parts.values())) == 600  # (i mod 200, i mod 300) repeats after 600
    prompts = {name: {prompt_digest(c) for c in part} for name, part in parts.items()}
    assert not prompts["train"] & (prompts["validation"] | prompts["test"])
    assert not prompts["validation"] & prompts["test"]
    assert held_out_prompts(some) == prompts["validation"] | prompts["test"]


def test_nothing_held_out_is_not_even_read():
    assert held_out_prompts(source("/nowhere/missing.jsonl")) == set()


def test_an_empty_split_says_what_to_set(path):
    with pytest.raises(InputError, match="the test split is empty") as caught:
        read_split(source(path), "test")
    assert "test_fraction 0" in caught.value.found
    assert "test_fraction" in caught.value.do
    with pytest.raises(InputError, match="the train split is empty"):
        read_split(source(path, test_fraction=1.0), "train")


def test_an_unknown_split_is_refused(path):
    with pytest.raises(InputError, match="no such split"):
        read_split(source(path), "dev")
