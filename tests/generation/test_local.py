"""Answers of local models: batched or not, by token ids or messages, sampled, streamed, cut."""

from __future__ import annotations

import copy

import pytest
import torch
from tiny import tiny_model
from transformers import GenerationConfig

from dominie.data.tokenization import prompt_ids
from dominie.generation.generator import GenerationRequest, Sampling, generate_all
from dominie.generation.local import OBEYED, LocalGenerator
from dominie.toyworld.toy_models import word_tokenizer

TEXTS = ["copy red", "copy blue 1 2 3", "add 4 5", "copy green", "repeat 7", "copy red 8 9"]


@pytest.fixture(scope="module")
def loaded():
    """A model whose answers vary in words and length, in double precision; and its tokenizer."""
    tokenizer = word_tokenizer()
    model = tiny_model(
        seed=3,
        dtype=torch.float64,
        vocab_size=len(tokenizer),
        initializer_range=0.6,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model.lm_head.weight.data[tokenizer.eos_token_id] *= 2.5  # so that answers end
    return model.eval(), tokenizer


def request(text, **sampling):
    messages = [{"role": "user", "content": text}]
    return GenerationRequest(
        messages=messages, sampling=Sampling(**{"max_new_tokens": 6, **sampling})
    )


def test_a_batch_gives_what_each_gives_alone(loaded):
    requests = [request(text, temperature=i % 2 * 1.5, seed=i) for i, text in enumerate(TEXTS * 2)]
    together = generate_all(LocalGenerator(lambda: loaded, batch=5), requests)
    alone = generate_all(LocalGenerator(lambda: loaded), requests)
    assert together == alone, "greedy and sampled rows alike"
    assert len({result.text for result in together}) > 5
    assert {result.stop_reason for result in together} == {"stop", "length"}


def test_token_ids_go_in_and_come_out_with_the_one_that_ended_them(loaded):
    _, tokenizer = loaded
    prompts = [prompt_ids(tokenizer, [{"role": "user", "content": text}]) for text in TEXTS]
    sampling = Sampling(max_new_tokens=6)
    generator = LocalGenerator(lambda: loaded, batch=3)
    by_ids = generate_all(
        generator, [GenerationRequest(token_ids=ids, sampling=sampling) for ids in prompts]
    )
    by_messages = generate_all(generator, [request(text) for text in TEXTS])
    assert [r.token_ids for r in by_ids] == [r.token_ids for r in by_messages]
    ended = [r for r in by_ids if r.stop_reason == "stop"]
    assert ended
    assert {r.token_ids[-1] for r in ended} == {tokenizer.eos_token_id}
    for result in by_ids:
        words = result.token_ids[:-1] if result in ended else result.token_ids
        assert tokenizer.eos_token_id not in words
        assert result.text == tokenizer.decode(words, skip_special_tokens=True)
    cut = next(r for r in by_ids if r.stop_reason == "length")
    own = GenerationRequest(
        token_ids=prompts[by_ids.index(cut)], sampling=sampling, stop_ids=(cut.token_ids[1],)
    )
    (stopped,) = generate_all(generator, [own])
    assert stopped.stop_reason == "stop"
    assert stopped.token_ids == cut.token_ids[: cut.token_ids.index(cut.token_ids[1]) + 1]


def test_a_request_has_one_prompt():
    for bad in ({}, {"messages": [], "token_ids": []}):
        with pytest.raises(ValueError, match="either messages or token_ids"):
            GenerationRequest(sampling=Sampling(max_new_tokens=1), **bad)


def first_tokens(loaded, count, **sampling):
    generator = LocalGenerator(lambda: loaded, batch=count)
    requests = [request("copy red", max_new_tokens=1, seed=i, **sampling) for i in range(count)]
    return [result.token_ids[0] for result in generate_all(generator, requests)]


def test_sampling_follows_the_temperature_the_seed_and_top_p(loaded):
    model, tokenizer = loaded
    prompt = prompt_ids(tokenizer, [{"role": "user", "content": "copy red"}])
    with torch.no_grad():
        logits = model(torch.tensor([prompt])).logits[0, -1]
    state = torch.random.get_rng_state()
    for temperature in (0.5, 2.0):
        drawn = first_tokens(loaded, 600, temperature=temperature)
        expected = torch.softmax(logits / temperature, -1)
        found = torch.bincount(torch.tensor(drawn), minlength=len(expected)) / 600
        assert float((found - expected).cumsum(-1).abs().max()) < 0.08  # Kolmogorov, at 0.1 %
        assert float(found[expected.argmax()]) == pytest.approx(float(expected.max()), abs=0.07)
        assert drawn == first_tokens(loaded, 600, temperature=temperature)
    probabilities, order = torch.softmax(logits, -1).sort(descending=True)
    kept = int((probabilities.cumsum(-1) - probabilities < 0.5).sum())
    nucleus = first_tokens(loaded, 600, temperature=1.0, top_p=0.5)
    assert set(nucleus) <= set(order[:kept].tolist())
    assert len(set(nucleus)) > 1
    assert set(first_tokens(loaded, 9, temperature=0.0)) == {int(logits.argmax())}
    assert torch.equal(torch.random.get_rng_state(), state)


MARKS = ["<|channel|>", "<|message|>", "<|start|>", "[THINK]", "[/THINK]"]


@pytest.mark.parametrize(
    ("written", "answer", "thoughts"),
    [
        ("[THINK] blue [/THINK] red", "red", "blue"),
        ("[THINK] blue", "", "blue"),
        ("red <|assistant|> blue", "red blue", ""),
        ("<|channel|> final <|message|> red", "red", ""),
        ("<|channel|> analysis <|message|> blue <|start|> <|channel|> final <|message|> red", "red",
         "blue"),
    ],
)  # fmt: skip
def test_special_tokens_set_thoughts_apart(loaded, monkeypatch, written, answer, thoughts):
    model, _ = loaded
    tokenizer = word_tokenizer()
    tokenizer.add_special_tokens(
        {"additional_special_tokens": MARKS}, replace_extra_special_tokens=False
    )
    tokenizer.add_tokens(["analysis", "final"])
    tokens = tokenizer(written, add_special_tokens=False)["input_ids"]
    assert tokenizer.unk_token_id not in tokens
    monkeypatch.setattr(
        model, "generate", lambda input_ids, **_: torch.cat([input_ids, torch.tensor([tokens])], 1)
    )
    (found,) = generate_all(LocalGenerator(lambda: (model, tokenizer)), [request("copy red")])
    parted = found.parted()
    assert (parted.answer, parted.thoughts) == (answer, thoughts)
    assert found.parted(keep_thoughts=True).answer == found.text


def test_thoughts_that_begin_in_the_prompt(loaded, monkeypatch):
    model, _ = loaded
    tokenizer = word_tokenizer()
    tokenizer.add_tokens(["<think>", "</think>"])
    tokenizer.chat_template = tokenizer.chat_template.replace(
        "<|assistant|>", "<|assistant|> <think>"
    )
    for written, answer in (("blue </think> red", "red"), ("blue green", "")):
        tokens = tokenizer(written, add_special_tokens=False)["input_ids"]
        made = torch.tensor([tokens])
        monkeypatch.setattr(
            model, "generate", lambda input_ids, made=made, **_: torch.cat([input_ids, made], 1)
        )
        (found,) = generate_all(LocalGenerator(lambda: (model, tokenizer)), [request("copy red")])
        assert found.begun
        assert found.parted().answer == answer


DECIDING = {
    "do_sample": True, "temperature": 9.0, "top_k": 1, "top_p": 0.1, "min_p": 0.9, "num_beams": 3,
    "repetition_penalty": 5.0, "no_repeat_ngram_size": 1, "max_time": 1e-9, "min_new_tokens": 6,
    "max_length": 3, "length_penalty": -3.0, "num_return_sequences": 2, "forced_bos_token_id": 5,
    "forced_eos_token_id": 5, "sequence_bias": [[[7], 99.0]], "guidance_scale": 3.0,
    "exponential_decay_length_penalty": (1, 9.0), "stop_strings": ["e"], "token_healing": True,
    "return_dict_in_generate": True, "typical_p": 0.1, "penalty_alpha": 0.9, "use_cache": False,
}  # fmt: skip


def test_no_setting_of_a_model_makes_answers_other_than_greedy(loaded, monkeypatch):
    model, _ = loaded
    asked = [request(text, temperature=i % 2) for i, text in enumerate(TEXTS)]
    before = generate_all(LocalGenerator(lambda: loaded, batch=3), asked)
    greedy = copy.deepcopy(model.generation_config)
    for name in {*vars(GenerationConfig()), *DECIDING, "of_a_later_version"} - {*OBEYED}:
        monkeypatch.setattr(
            model.generation_config, name, DECIDING.get(name, "nonsense"), raising=False
        )
    assert generate_all(LocalGenerator(lambda: loaded, batch=3), asked) == before
    assert model.generation_config.repetition_penalty == 5.0, "the model's own are as they were"
    monkeypatch.setattr(model, "generation_config", greedy)
    for name, value in DECIDING.items():
        monkeypatch.setattr(greedy, name, value)
        assert generate_all(LocalGenerator(lambda: loaded), asked[:1]) == before[:1], name
        monkeypatch.undo()
        monkeypatch.setattr(model, "generation_config", greedy)


def test_tokens_that_a_model_must_not_write_and_ends_of_answers_count(loaded, monkeypatch):
    model, _ = loaded
    (before,) = generate_all(LocalGenerator(lambda: loaded), [request("copy red")])
    first = before.token_ids[0]
    for name, value in (("suppress_tokens", [first]), ("bad_words_ids", [[first]])):
        monkeypatch.setattr(model.generation_config, name, value)
        (obeyed,) = generate_all(LocalGenerator(lambda: loaded), [request("copy red")])
        assert first not in obeyed.token_ids
        monkeypatch.setattr(model.generation_config, name, None)
    monkeypatch.setattr(model.generation_config, "eos_token_id", [first])
    (obeyed,) = generate_all(LocalGenerator(lambda: loaded), [request("copy red")])
    assert obeyed.token_ids == [first]
    assert obeyed.stop_reason == "stop"


def test_a_prompt_that_fills_the_context_is_answered_with_nothing(loaded):
    generator = LocalGenerator(lambda: loaded, batch=4)
    texts = ["red " * 70, "red " * 57, TEXTS[0]]  # with the template's tokens, room for a few
    full, near, short = generate_all(generator, [request(t, max_new_tokens=20) for t in texts])
    assert (full.text, full.stop_reason, full.token_ids) == ("", "length", [])
    assert 0 < len(near.token_ids) <= 64 - 57
    assert [short] == generate_all(generator, [request(TEXTS[0], max_new_tokens=20)])


def test_text_comes_in_pieces_and_a_further_request_is_answered_next(loaded):
    generator = LocalGenerator(lambda: loaded, batch=2)
    pieces, results, progress = {0: [], 1: []}, [], []

    def on_result(index, result):
        results.append((index, result.text))
        return request("copy blue 1") if len(results) == 1 else None

    generator.generate(
        [request("copy red"), request("add 4 5")],
        on_result,
        on_text=lambda index, piece: pieces[index].append(piece),
        advance=lambda done, total, note: progress.append((done, total)),
    )
    first = results[0][0]
    assert [index for index, _ in results] == [first, first, 1 - first]
    for index in (0, 1):
        whole = " ".join(text for i, text in results if i == index)
        assert "".join(pieces[index]).replace(" ", "") == whole.replace(" ", "")
        assert len(pieces[index]) > 1
    assert progress[-1] == (2, 2)


def test_nothing_is_loaded_for_nothing():
    LocalGenerator(pytest.fail, batch=2).generate([], pytest.fail)
