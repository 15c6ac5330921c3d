"""Answers of local models: turn by turn, batched or not, kept by everything they depend on."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import MistralConfig, MistralForCausalLM, set_seed

from dominie.core.errors import InputError
from dominie.data.tokenization import prompt_ids
from dominie.generation.generator import Dialogue, LocalGenerator, answers
from dominie.judge.benchmark import AnswerFile
from dominie.toyworld.toy_models import word_tokenizer

WORDS = ["copy red", "copy blue 1 2 3", "add 4 5", "copy green", "repeat 7", "copy red 8 9"]


@pytest.fixture(scope="module")
def talker():
    """A model whose answers vary in words and length, in double precision."""
    tokenizer = word_tokenizer()
    set_seed(3)
    config = MistralConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
        sliding_window=None,
        initializer_range=0.6,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return MistralForCausalLM(config).double().eval(), tokenizer


def speaker(talker, *, load=None, fingerprint="f", batch=4, max_new_tokens=6, seed=0):
    return LocalGenerator(
        load or (lambda: talker),
        [fingerprint],
        max_new_tokens=max_new_tokens,
        batch=batch,
        seed=seed,
    )


def spoken(speaker, dialogues):
    found = {}
    speaker.speak(dialogues, lambda d, turns: found.update({d.id: list(turns)}), lambda *_: None)
    return found


def dialogues(temperature=0.0):
    return [
        Dialogue(i, (words, *([WORDS[-1 - i]] if i % 3 else [])), temperature)
        for i, words in enumerate(WORDS)
    ]


def test_a_batch_says_what_each_says_alone(talker):
    together = spoken(speaker(talker, batch=4), dialogues())
    alone = spoken(speaker(talker, batch=1), dialogues())
    assert together == alone
    assert len({tuple(turns) for turns in together.values()}) > 3
    assert [len(together[i]) for i in range(6)] == [1, 2, 2, 1, 2, 2]


def test_the_second_turn_sees_the_first(talker):
    model, tokenizer = talker
    dialogue = dialogues()[1]
    said = spoken(speaker(talker), [dialogue])[1]
    chat = [
        {"role": "user", "content": dialogue.turns[0]},
        {"role": "assistant", "content": said[0]},
        {"role": "user", "content": dialogue.turns[1]},
    ]
    prompt = prompt_ids(tokenizer, chat)
    end = [tokenizer.eos_token_id]
    [(_, text)] = answers(model, tokenizer, [prompt], end_of_turn=end, max_new_tokens=6, batch=1)
    assert said[1] == text.strip()


def test_sampling_follows_the_temperature_and_the_seed(talker):
    model, tokenizer = talker
    prompt = prompt_ids(tokenizer, [{"role": "user", "content": "copy red"}])
    common = {"end_of_turn": [tokenizer.eos_token_id], "batch": 400, "max_new_tokens": 1}
    with torch.no_grad():
        logits = model(torch.tensor([prompt])).logits[0, -1]
    state = torch.random.get_rng_state()
    for temperature in (0.5, 2.0):
        drawn = dict(
            answers(model, tokenizer, [prompt] * 400, temperature=temperature, seed=1, **common)
        )
        expected = torch.softmax(logits / temperature, -1)
        best = tokenizer.decode(int(expected.argmax()), skip_special_tokens=True)
        share = sum(text == best for text in drawn.values()) / 400
        assert share == pytest.approx(float(expected.max()), abs=0.1)
        again = answers(model, tokenizer, [prompt] * 400, temperature=temperature, seed=1, **common)
        assert dict(again) == drawn
        other = answers(model, tokenizer, [prompt] * 400, temperature=temperature, seed=2, **common)
        assert dict(other) != drawn
    assert torch.equal(torch.random.get_rng_state(), state)


def test_a_prompt_that_fills_the_context_is_answered_with_nothing(talker):
    long = Dialogue("long", ("red " * 70,))
    near = Dialogue("near", ("red " * 57,))  # with the template's tokens, room for a few words
    found = spoken(speaker(talker, max_new_tokens=20), [long, near, dialogues()[0]])
    assert found["long"] == [""]
    assert len(found["near"][0].split()) <= 64 - 57
    assert found[0] == spoken(speaker(talker, max_new_tokens=20), dialogues()[:1])[0]


@pytest.fixture
def file(tmp_path):
    return AnswerFile(
        tmp_path / "deep" / "answers.jsonl",
        line=lambda d, turns: {"question_id": d.id, "choices": [{"turns": list(turns)}]},
        turns=lambda line: line["choices"][0]["turns"],
    )


def test_answers_are_kept_by_all_they_depend_on(talker, file):
    loads = []

    def load():
        loads.append(1)
        return talker

    first = file.complete(dialogues(), speaker(talker, load=load), lambda *_: None)
    assert len(loads) == 1
    assert file.complete(dialogues(), speaker(talker, load=load), lambda *_: None) == first
    assert len(loads) == 1
    content = file.path.read_text()
    for changed in ({"fingerprint": "g"}, {"max_new_tokens": 5}, {"seed": 9}):
        file.complete(dialogues(), speaker(talker, load=load, **changed), lambda *_: None)
        assert len(file.path.read_text().splitlines()) == 6
        file.path.write_text(content)
    assert len(loads) == 4
    file.complete(dialogues(0.5), speaker(talker, load=load), lambda *_: None)
    assert len(loads) == 5


def test_a_crash_loses_no_batch_that_was_done(talker, file):
    class Dies(Exception):
        pass

    def dying(done, total, note):
        if done >= 4:
            raise Dies

    with pytest.raises(Dies):
        file.complete(dialogues(), speaker(talker, batch=2), dying)
    kept = [json.loads(line) for line in file.path.read_text().splitlines()]
    assert len(kept) == 4
    asked = []

    class Counting(LocalGenerator):
        def speak(self, dialogues, done, advance):
            asked.extend(d.id for d in dialogues)
            super().speak(dialogues, done, advance)

    rest = Counting(lambda: talker, ["f"], max_new_tokens=6, batch=2)
    found = file.complete(dialogues(), rest, lambda *_: None)
    assert len(asked) == 2
    assert found == spoken(speaker(talker), dialogues())
    order = [json.loads(line)["question_id"] for line in file.path.read_text().splitlines()]
    assert order == list(range(6))


def test_a_line_without_answers_is_named(talker, file):
    file.complete(dialogues(), speaker(talker), lambda *_: None)
    lines = file.path.read_text().splitlines()
    lines[2] = json.dumps({**json.loads(lines[2]), "choices": "none"})
    file.path.write_text("\n".join(lines) + "\n")
    with pytest.raises(InputError, match="holds no answers"):
        file.complete(dialogues(), speaker(talker), lambda *_: None)
