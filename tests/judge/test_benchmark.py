"""Answers to dialogues: turn by turn, and kept by everything they depend on."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest

from dominie.core.errors import InputError
from dominie.generation.calls import Calls
from dominie.generation.endpoint import Endpoint
from dominie.generation.generator import EndpointGenerator, Generation
from dominie.generation.reply_log import ReplyLog
from dominie.judge.benchmark import AnswersFile, Dialogue, answer_dialogues

from fault_server import reply  # isort: skip

TEXTS = ["copy red", "copy blue 1 2 3", "add 4 5", "copy green", "repeat 7", "copy red 8 9"]


class Echo:
    """Answers with the number of messages and the last of them, two requests at a time."""

    def __init__(self, fingerprint="f"):
        self.fingerprint, self.requests = fingerprint, []

    def identity(self, sampling):
        return {"model": self.fingerprint, "n": sampling.max_new_tokens, "seed": sampling.seed}

    def generate(self, requests, on_result, *, on_text=None, advance=None):
        waiting, complete = list(enumerate(requests)), 0
        while waiting:
            batch, waiting = waiting[:2], waiting[2:]
            for index, request in reversed(batch):
                self.requests.append(request)
                text = f"{len(request.messages)}: {request.messages[-1]['content']}"
                following = on_result(index, Generation(text, "stop"))
                if following is not None:
                    waiting.insert(0, (index, following))
                complete += following is None
            advance(complete, len(requests), "")


def dialogues(temperature=0.0):
    return [
        Dialogue(i, (text, *([TEXTS[-1 - i]] if i % 3 else [])), temperature)
        for i, text in enumerate(TEXTS)
    ]


def benchmark(**more):
    return SimpleNamespace(
        **{"dialogues": dialogues(), "max_new_tokens": 6, "seed": 0, **more},
        answer_row=lambda d, turns, model: {
            "question_id": d.id, "model_id": model, "choices": [{"turns": list(turns)}]
        },
        answers_in=lambda row: row["choices"][0]["turns"],
    )  # fmt: skip


@pytest.fixture
def complete(tmp_path):
    def run(generator, advance=lambda *_: None, **more):
        return run.file(**more).complete(generator, advance)

    run.path = tmp_path / "deep" / "answers.jsonl"
    run.file = lambda **more: AnswersFile(run.path, benchmark(**more), "me")
    return run


def test_the_second_turn_has_the_first_answer_before_it():
    found, generator = {}, Echo()
    answer_dialogues(
        generator, dialogues(0.5), lambda d, turns: found.update({d.id: list(turns)}),
        lambda *_: None, max_new_tokens=6, seed=3,
    )  # fmt: skip
    assert found[0] == ["1: copy red"]
    assert found[1] == ["1: copy blue 1 2 3", "3: repeat 7"]
    assert {(r.sampling.temperature, r.sampling.seed) for r in generator.requests} == {(0.5, 3)}
    second = next(r for r in generator.requests if r.messages[-1]["content"] == "repeat 7")
    roles = [message["role"] for message in second.messages]
    assert (roles, second.messages[1]["content"]) == (["user", "assistant", "user"], found[1][0])


def test_answers_are_kept_by_all_they_depend_on(complete):
    first = complete(generator := Echo())
    assert len(generator.requests) == 10
    assert complete(again := Echo()) == first
    assert again.requests == []
    content = complete.path.read_text()
    for fingerprint, changed in (("g", {}), ("f", {"max_new_tokens": 5}), ("f", {"seed": 9})):
        complete(anew := Echo(fingerprint), **changed)
        assert len(anew.requests) == 10
        assert len(complete.path.read_text().splitlines()) == 6
        complete.path.write_text(content)
    complete(warmer := Echo(), dialogues=dialogues(0.5))
    assert len(warmer.requests) == 10


def test_a_crash_loses_no_dialogue_that_was_complete(complete):
    class Dies(Exception):
        pass

    def dying(done, total, note):
        if done >= 4:
            raise Dies

    with pytest.raises(Dies):
        complete(Echo(), dying)
    kept = [json.loads(line) for line in complete.path.read_text().splitlines()]
    assert len(kept) == 4
    found = complete(rest := Echo())
    assert {r.messages[0]["content"] for r in rest.requests} == {
        TEXTS[i] for i in set(range(6)) - {row["question_id"] for row in kept}
    }
    assert found[1] == ["1: copy blue 1 2 3", "3: repeat 7"]
    order = [json.loads(line)["question_id"] for line in complete.path.read_text().splitlines()]
    assert order == list(range(6))


def test_a_line_without_answers_is_named(complete):
    complete(Echo())
    lines = complete.path.read_text().splitlines()
    row = json.loads(lines[2])
    lines[2] = json.dumps({**row, "choices": "none"})
    complete.path.write_text("\n".join(lines) + "\n")
    with pytest.raises(InputError, match=r"(?s)answers\.jsonl:3.*damaged.*checksum is another"):
        complete(Echo())
    del row["checksum"]  # as an earlier version wrote it
    lines[2] = json.dumps({**row, "choices": "none"})
    complete.path.write_text("\n".join(lines) + "\n")
    with pytest.raises(InputError, match="holds no answers"):
        complete(Echo())


def test_an_endpoint_answers_dialogues_too(complete, serve, tmp_path):
    server = serve(lambda asked: reply(f"{len(asked.body['messages'])} messages"))
    endpoint = Endpoint(endpoint=server.url, model="m", backoff=0.01)
    log = ReplyLog(tmp_path / "replies.jsonl")
    generator = EndpointGenerator(Calls(endpoint, log, where="it", show=print))
    found = complete(generator)
    assert found[0] == ["1 messages"]
    assert found[1] == ["1 messages", "3 messages"]
    assert set(server.bodies[0]) == {*("model", "messages", "temperature", "max_tokens", "stream")}
    complete.path.unlink()
    assert complete(generator) == found
    assert set(server.paid.values()) == {1}, "replies are found in the log"
