"""Log-probabilities of prompts: what is asked of each server, and what is read of its reply."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest
from score_server import Scorer

from dominie.core.errors import InputError
from dominie.generation.endpoint import Budget, ServedModel, largest_reply, score_body, score_url
from dominie.generation.prompt_scores import (
    BadScores,
    scores_of,
    server_facts,
)
from dominie.generation.reply_log import ScoreLog, read_scored

IDS = [3, 5, 8, 1, 1, 7, 2, 9]


def served(**settings: Any) -> ServedModel:
    return ServedModel(**{"endpoint": "http://host:1/v1/", "model": "m"} | settings)


@pytest.mark.parametrize("engine", ["vllm", "sglang"])
@pytest.mark.parametrize(("k", "vocabulary"), [(1, 10), (4, 10), (13, 10)])
def test_entries_are_of_the_token_that_stands_there(engine, k, vocabulary):
    scorer = Scorer(vocabulary, engine=engine)
    text = json.dumps(scorer.tree(IDS, k))
    reply = read_scored(text)
    assert reply is not None
    assert reply.usage == (8, 1)
    assert len(text) < largest_reply(len(IDS), k)
    positions = [2, 5, 7]
    found = scores_of(reply, engine, IDS, positions, k=k, vocabulary=vocabulary)
    starts = np.cumsum([0, *found.counts])
    for number, j in enumerate(positions):
        log_p = scorer.log_p[IDS[j - 1]]
        here = slice(starts[number], starts[number + 1])
        likeliest = set(np.argsort(-log_p)[:k].tolist()) | {IDS[j]}
        assert set(found.ids[here]) == {each for each in likeliest if each < vocabulary}
        np.testing.assert_allclose(found.log_probs[here], log_p[found.ids[here]])
        assert (np.diff(found.log_probs[here]) <= 0).all()
        assert found.actual[number] == pytest.approx(log_p[IDS[j]])
        if k == vocabulary + 3:
            padding = math.fsum(np.exp(log_p[vocabulary:]))
            assert np.exp(found.log_probs[here]).sum() == pytest.approx(1 - padding)


def test_a_token_without_probability_leaves_the_likeliest():
    scorer = Scorer(10)
    tree = scorer.tree(IDS, 2)
    entry = tree["choices"][0]["prompt_logprobs"][3]
    least = min(entry, key=lambda each: entry[each]["logprob"])
    token = str(IDS[3])
    entry[token] = {"logprob": -9999.0, "rank": 10}
    if least != token and len(entry) > 3:
        del entry[least]
    found = scores_of(read_scored(json.dumps(tree)), "vllm", IDS, [3], k=2, vocabulary=10)
    assert found.actual[0] == -9000.0
    assert IDS[3] not in found.ids
    entry[next(each for each in entry if each != token)]["logprob"] = -9999.0
    reply = read_scored(json.dumps(tree))
    with pytest.raises(BadScores, match="NaN, infinite"):
        scores_of(reply, "vllm", IDS, [3], k=2, vocabulary=10)


def test_requests_are_of_ids_and_greedy():
    assert score_url(served(), "vllm") == "http://host:1/v1/completions"
    assert score_url(served(), "sglang") == "http://host:1/generate"
    asked = score_body(served(request={"priority": 1}), "vllm", np.array(IDS).tolist(), 20)
    assert asked == {
        "model": "m",
        "prompt": IDS,
        "max_tokens": 1,
        "temperature": 0.0,
        "prompt_logprobs": 20,
        "priority": 1,
    }
    other = score_body(served(), "sglang", IDS, 20)
    assert (other["input_ids"], other["top_logprobs_num"]) == (IDS, 20)
    assert (other["logprob_start_len"], other["return_logprob"]) == (0, True)


@pytest.mark.parametrize("body", ["", "{", "[]", '{"error": "x"}', "<html>", '{"a": 1}'])
def test_what_is_no_reply_is_none(body):
    assert read_scored(body) is None


def test_facts_are_what_the_server_tells(serve):
    scorer = Scorer(10, engine="sglang")
    where = served(endpoint=serve(scorer).url, model="org/big")
    facts = server_facts(where, where="models.big")
    assert (facts.engine, facts.version, facts.weights, facts.longest) == (
        "sglang",
        "0.32.0",
        "1",
        4096,
    )
    with pytest.raises(InputError, match="no such model on the server") as caught:
        server_facts(served(endpoint=where.endpoint, model="org/bg"), where="models.big")
    assert "org/big" in str(caught.value)


def test_a_log_of_calls_holds_no_prompt_and_no_reply(tmp_path):
    log = ScoreLog(tmp_path / "calls.jsonl", on_disk=True)
    record = {"key": "a", "status": 200, "request": {"prompt": IDS}, "body": "x" * 10_000}
    log.append(record, record | {"key": "b", "status": 500, "body": "y" * 9_000})
    assert (tmp_path / "calls.jsonl").stat().st_size < 1500
    assert [each["request"]["prompt_tokens"] for each in log.records] == [8, 8]
    again = ScoreLog(tmp_path / "calls.jsonl", on_disk=True)
    assert len(again.records) == 2
    unlogged = ScoreLog(tmp_path / "none.jsonl", on_disk=False)
    unlogged.append(record)
    assert len(unlogged.of("a")) == 1
    assert not (tmp_path / "none.jsonl").exists()


def test_a_budget_may_be_in_tokens():
    with pytest.raises(ValueError, match="buys nothing"):
        Budget(tokens=0)
