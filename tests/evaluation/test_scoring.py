"""Scores of tiny models against naive recomputation: one conversation at a time, all logits."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from dominie.core.errors import InputError
from dominie.data.conversations import Conversation
from dominie.data.tokenization import encode
from dominie.evaluation.likelihood import choice
from dominie.evaluation.scoring import (
    generate_outputs,
    score_outputs,
)
from dominie.evaluation.task import MetricSettings, candidates, questions
from dominie.generation.generator import Generation, GenerationRequest, Sampling, generate_all
from dominie.generation.local import LocalGenerator

END = 3


def conversation(prompt: str, answer: str, **fields: str) -> Conversation:
    messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
    return Conversation(messages, where="d.jsonl:1", fields=fields)


def naive_answer(model: Any, tokenizer: Any, prompt: list[int], limit: int) -> str:
    """Greedy decoding without a cache, without padding."""
    ids = list(prompt)
    for _ in range(limit):
        with torch.no_grad():
            ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
        if ids[-1] == END:
            ids.pop()
            break
    return tokenizer.decode(ids[len(prompt) :], skip_special_tokens=True)


def request(prompt: list[int], stop: int) -> GenerationRequest:
    sampling = Sampling(max_new_tokens=12)
    return GenerationRequest(token_ids=prompt, stop_ids=(stop,), sampling=sampling)


def test_batched_left_padded_answers_are_those_of_one_at_a_time(model, tokenizer, asked):
    prompts = [question.prompt_ids for question in asked]
    assert len({len(prompt) for prompt in prompts}) > 5, "there is padding"
    expected = [naive_answer(model, tokenizer, prompt, 12) for prompt in prompts]
    assert len({len(text.split()) for text in expected}) > 2, "some end before others"
    for batch in (1, 7, 64):
        generator = LocalGenerator(lambda: (model, tokenizer), batch=batch)
        results = generate_all(generator, [request(prompt, END) for prompt in prompts])
        assert [result.text for result in results] == expected


def test_an_answer_s_own_stop_is_obeyed_beside_the_configured_one(model, tokenizer, asked):
    wholes = [naive_answer(model, tokenizer, q.prompt_ids, 12).split() for q in asked]
    number, whole = next((i, words) for i, words in enumerate(wholes) if len(set(words)) > 2)
    prompt = asked[number].prompt_ids
    stop = tokenizer.convert_tokens_to_ids(whole[-1])
    (result,) = generate_all(LocalGenerator(lambda: (model, tokenizer)), [request(prompt, stop)])
    assert result.text.split() == whole[: whole.index(whole[-1])]


def test_exact_match_counts_word_for_word_answers(model, tokenizer, asked):
    """Every third question is given the model's own answer for a target."""
    own = {i: naive_answer(model, tokenizer, asked[i].prompt_ids, 20) for i in range(0, 23, 3)}
    changed = []
    for i, question in enumerate(asked):
        target = "  " + own[i].replace(" ", "  ") + "\n" if i in own else question.target
        answer = {"role": "assistant", "content": target}
        row = replace(question.conversation, messages=[*question.asked, answer])
        changed.append(replace(question, target=target, conversation=row))
    outputs = generate_outputs(model, tokenizer, changed, max_new_tokens=20, batch=5)
    scored = score_outputs(changed, outputs, MetricSettings())
    score = scored.result
    right = np.array([i in own for i in range(23)], float)
    assert score.n == 23
    assert score.score == pytest.approx(right.mean())
    assert score.stderr == pytest.approx(right.std(ddof=1) / np.sqrt(23))
    for name in ("odd", "even"):
        members = np.array([i for i, q in enumerate(asked) if q.group == name])
        group = score.by[name]
        assert group.n == len(members)
        assert group.score == pytest.approx(right[members].mean())
    assert sum(group.n for group in score.by.values()) == 22, "one row has no group"
    assert [sample["correct"] for sample in scored.samples] == right.astype(bool).tolist()
    assert [sample["prompt"] for sample in scored.samples] == [q.prompt for q in asked]
    written = score.as_dict()
    assert written["groups"]["odd"]["n"] == score.by["odd"].n
    assert {"score", "stderr", "n"} <= written.keys()


def test_thoughts_are_scored_only_if_the_task_keeps_them(asked):
    marked = ["<think>\n\n</think>\n\n{}", "{}", "Perhaps red?</think>{}", "[THINK]no[/THINK]{}"]
    changed, outputs = [], []
    for i, question in enumerate(asked[:8]):
        target = question.target if i % 2 else f"<think>\nhm\n</think>\n\n{question.target}"
        messages = [*question.asked, {"role": "assistant", "content": target}]
        row = replace(question.conversation, messages=messages)
        changed.append(replace(question, target=target, conversation=row))
        outputs.append(Generation(marked[i % 4].format(question.target), "stop"))
    scored = score_outputs(changed, outputs, MetricSettings())
    assert scored.result.score == 1.0
    assert scored.result.extras == {}
    assert [s["output"] for s in scored.samples] == [s["target"] for s in scored.samples]
    assert scored.samples[2]["thoughts"] == "Perhaps red?"
    kept = score_outputs(changed, outputs, MetricSettings(keep_thoughts=True))
    assert kept.result.score == 2 / 8, "a target without thoughts, and an output alike"
    labels = sorted({question.target for question in asked})
    by_label = MetricSettings(metric="macro_f1", labels=labels)
    assert score_outputs(changed, outputs, by_label).result.extras == {"invalid": 0.0}


def test_cut_and_empty_outputs_are_counted(asked):
    texts = ["<think>\nLet me", "Let me", "", "red"]
    ends = [("length", True), ("length", False), ("stop", False), ("stop", False)]
    outputs = [
        Generation(text, end, begun=begun) for text, (end, begun) in zip(texts, ends, strict=True)
    ]
    scored = score_outputs(asked[:4], outputs, MetricSettings())
    assert scored.result.extras == {"cut": 0.5, "empty": 0.5}
    assert [s.get("cut", False) for s in scored.samples] == [True, True, False, False]
    assert [s.get("empty", False) for s in scored.samples] == [True, False, True, False]


@pytest.mark.parametrize("settings", [{"metric": m} for m in ("choice", "agreement", "forgetting")])
def test_thoughts_mean_nothing_without_an_answer(settings):
    with pytest.raises(ValueError, match="keep_thoughts means nothing"):
        MetricSettings(**settings, keep_thoughts=True)


def test_a_question_is_all_before_the_last_answer(tokenizer):
    messages = [
        {"role": "user", "content": "red"},
        {"role": "assistant", "content": "blue"},
        {"role": "user", "content": "green"},
        {"role": "assistant", "content": "black"},
    ]
    (question,) = questions(tokenizer, [Conversation(messages)])
    assert question.target == "black"
    assert question.prompt == "user: red\nassistant: blue\nuser: green"
    assert question.group is None
    assert question.end_of_turn == END
    length = len(question.prompt_ids)
    assert question.encoded.input_ids[:length] == question.prompt_ids
    assert tokenizer.decode(question.encoded.input_ids[length:]).split()[0] == "black"


def test_questions_that_ask_nothing_or_have_no_such_field_are_refused(tokenizer):
    nothing = Conversation([{"role": "assistant", "content": "red"}], where="d.jsonl:7")
    with pytest.raises(InputError, match=r"d\.jsonl:7: nothing is asked"):
        questions(tokenizer, [nothing])
    with pytest.raises(InputError, match=r"(?s)no row has the field 'topic'.*one of family"):
        questions(tokenizer, [conversation("red", "blue", family="a")], by="topic")


OPTIONS = ["red", "blue green red black", "green blue"]


def choice_row(prompt: str, answer: str, **fields: Any) -> Conversation:
    messages = [
        {"role": "user", "content": "red"},
        {"role": "assistant", "content": "blue blue"},
        {"role": "user", "content": prompt},
        {"role": "assistant", "content": answer},
    ]
    return Conversation(messages, where="d.jsonl:1", fields=fields)


def naive_likelihood(model, tokenizer, row: Conversation, option: str) -> tuple[float, int]:
    """Log-likelihood of an option as the last answer, and its tokens."""
    messages = [*row.messages[:-1], {"role": "assistant", "content": option}]
    ids, supervised, _ = encode(tokenizer, Conversation(messages))
    last = max(i for i, flag in enumerate(supervised) if not flag) + 1
    with torch.no_grad():
        logits = torch.log_softmax(model(input_ids=torch.tensor([ids])).logits[0], -1)
    return sum(float(logits[i - 1, ids[i]]) for i in range(last, len(ids))), len(ids) - last


@pytest.mark.parametrize("likelihood", ["sum", "tokens", "bytes"])
@pytest.mark.parametrize("batch", [1, 4, 64])
def test_the_most_likely_option_is_the_answer(model, tokenizer, likelihood, batch):
    prompts = ["black", "green red", "blue blue blue", "red black red green", "green"]
    rows = [choice_row(prompt, OPTIONS[i % 3], options=OPTIONS) for i, prompt in enumerate(prompts)]
    scored = choice(
        model, tokenizer, questions(tokenizer, rows), likelihood=likelihood, batch=batch
    )
    right = 0
    for row, sample in zip(rows, scored.samples, strict=True):
        found = []
        for option in OPTIONS:
            total, tokens = naive_likelihood(model, tokenizer, row, option)
            found.append(total / {"sum": 1, "tokens": tokens, "bytes": len(option)}[likelihood])
        assert sample["log_likelihoods"] == pytest.approx(found, abs=1e-4)
        assert sample["output"] == OPTIONS[found.index(max(found))]
        right += sample["output"] == row.answer
    assert scored.result.score == right / 5
    assert scored.result.n == 5


def test_length_decides_only_where_it_may(model, tokenizer):
    """Summed, a short option wins more often than divided by its tokens."""
    rows = [
        choice_row(" ".join(("red", "blue", "green", "black")[: i % 4 + 1] * (i // 4 + 1)), "red")
        for i in range(12)
    ]
    rows = [Conversation(r.messages, fields={"options": OPTIONS}) for r in rows]
    asked = questions(tokenizer, rows)
    scores = {
        kind: choice(model, tokenizer, asked, likelihood=kind).result.score
        for kind in ("sum", "tokens")
    }
    assert scores["sum"] > scores["tokens"]


def test_options_are_answers_or_their_labels():
    assert candidates(choice_row("?", "b", options=["a", "b"]), "options") == (["a", "b"], 1)
    lettered = '["A: wool", "B: silk", "C: linen"]'
    assert candidates(choice_row("?", "B", options=lettered), "options") == (["A", "B", "C"], 1)
    whole = candidates(choice_row("?", "B: silk", options=lettered), "options")
    assert whole == (["A: wool", "B: silk", "C: linen"], 1)
    chinese = choice_row("?", "B", options=["Ａ．棉", "Ｂ．丝"])
    assert candidates(chinese, "options") == (["Ａ", "Ｂ"], 1)
    assert candidates(choice_row("?", "나", options=["가) 면", "나) 견"]), "options")[1] == 1


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "no options to choose from"),
        ({"options": ["a"]}, "no options to choose from"),
        ({"options": "a or b"}, "no options to choose from"),
        ({"options": ["a", "b"]}, "none of the options"),
    ],
)
def test_rows_without_a_choice_are_refused(fields, message):
    with pytest.raises(InputError, match=rf"d\.jsonl:1.*{message}"):
        candidates(choice_row("?", "c", **fields), "options")
