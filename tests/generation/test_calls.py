"""Calls over a bad line: failures are survived, budgets kept, nothing is paid for twice."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import time

import pytest
from fault_server import Answer, reply

from dominie.core.errors import InputError, RunError
from dominie.generation.calls import Calls
from dominie.generation.endpoint import Budget, Endpoint, Price
from dominie.generation.generator import (
    EndpointGenerator,
    GenerationRequest,
    Sampling,
    generate_all,
)
from dominie.generation.reply_log import ReplyLog

FILLER = "Say what you think of it. " * 20  # about the tokens that the server counts


def endpoint(server, **settings):
    quick = {"backoff": 0.01, "timeout": 0.5, "concurrency": 4}
    return Endpoint(endpoint=getattr(server, "url", server), model="m", **{**quick, **settings})


@pytest.fixture
def ask(tmp_path):
    """Asks an endpoint some questions through a generator; returns the texts."""

    def run(endpoint, count, max_new_tokens=100):
        run.calls = Calls(endpoint, ReplyLog(tmp_path / "l.jsonl"), where="judge", show=print)
        sampling = Sampling(max_new_tokens=max_new_tokens)
        requests = [
            GenerationRequest(
                messages=[{"role": "user", "content": f"It is {i}. {FILLER}"}], sampling=sampling
            )
            for i in range(count)
        ]
        found = generate_all(EndpointGenerator(run.calls), requests)
        return [result.text for result in found]

    return run


def test_every_kind_of_fault_is_survived(serve, ask):
    faults = [
        Answer(429, '{"error": "slow down"}', {"retry-after": "0.01"}),
        Answer(500, "oops"),
        Answer(503, "", {"retry-after": "soon"}),
        Answer(body="late", hang=1.5),
        Answer(body="x" * 100, cut=True),
        Answer(body="not json"),
        Answer(body='{"choices": []}'),
    ]
    server = serve(lambda a: faults[a.before] if a.before < len(faults) else reply("seven"))
    found = ask(endpoint(server, retries=10), 6)
    assert found == ["seven"] * 6
    assert set(server.asked.values()) == {len(faults) + 1}


def test_calls_at_once_are_bounded(serve, ask):
    server = serve(lambda a: Answer(**{**reply("five").__dict__, "hang": 0.03}))
    ask(endpoint(server, concurrency=3), 12)
    assert server.most_at_once == 3


def test_a_budget_of_calls_is_kept_to_the_call_and_over_runs(serve, ask):
    server = serve(lambda a: reply("five"))
    for budget, paid in ((7, 7), (7, 7), (9, 9)):
        with pytest.raises(RunError, match="budget is spent"):
            ask(endpoint(server, budget=Budget(calls=budget)), 20)
        assert sum(server.asked.values()) == paid
    assert len(ask(endpoint(server, budget=Budget(calls=20)), 20)) == 20


def test_a_budget_of_money_is_never_overspent(serve, ask):
    server = serve(lambda a: reply("five"))
    price = Price(input=1000.0, output=1000.0)  # a call of 110 tokens costs 0.11
    with pytest.raises(RunError, match="budget is spent"):
        ask(endpoint(server, budget=Budget(money=3.0), price=price), 100, max_new_tokens=10)
    assert 0 < ask.calls.budget.money <= 3.0
    assert ask.calls.budget.money == pytest.approx(0.11 * sum(server.asked.values()))
    assert ask.calls.budget.money > 2.0


def test_the_server_is_not_believed_about_usage(serve, ask):
    lie = json.loads(reply("five").body)
    lie["usage"] = {"prompt_tokens": -(10**9), "completion_tokens": 10**12}
    server = serve(lambda a: Answer(body=json.dumps(lie)))
    ask(endpoint(server, price=Price(input=1.0, output=1.0)), 1)
    assert 0 < ask.calls.budget.money < 0.01


def test_a_wait_that_is_asked_for_is_kept(serve, ask):
    server = serve(
        lambda a: Answer(429, "", {"retry-after": "0.4"}) if not a.before else reply("five")
    )
    began = time.monotonic()
    assert ask(endpoint(server, backoff=0.0), 1) == ["five"]
    assert time.monotonic() - began >= 0.4


def test_absurd_waits_are_not_obeyed(serve, ask, monkeypatch):
    monkeypatch.setattr("dominie.generation.http_client._LONGEST_WAIT", 0.05)
    waits = ["1e9", "-5", "nan", "inf", "Fri, 31 Dec 2999 23:59:59 GMT"]
    server = serve(
        lambda a: (
            Answer(429, "", {"retry-after": waits[a.before]})
            if a.before < len(waits)
            else reply("five")
        )
    )
    began = time.monotonic()
    assert ask(endpoint(server), 1) == ["five"]
    assert time.monotonic() - began < 5


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (Answer(401, "no such key"), "asks for a key"),
        (Answer(403, ""), "asks for a key"),
        (Answer(404, "The model `m` does not exist"), "does not exist"),
        (Answer(400, "logprobs are not supported"), "logprobs are not supported"),
        (Answer(301, "", {"location": "http://elsewhere/"}), "HTTP 301"),
        (Answer(429, '{"error": {"code": "insufficient_quota"}}'), "insufficient_quota"),
    ],
)
def test_a_refusal_is_one_clear_message(serve, ask, answer, words):
    with pytest.raises(InputError, match=words):
        ask(endpoint(serve(lambda a: answer), concurrency=1), 8)


def test_nobody_listens(ask):
    with pytest.raises(InputError, match="cannot be reached"):
        ask(endpoint("http://127.0.0.1:9/v1"), 3)


def test_a_server_that_dies_midway_ends_the_run_and_keeps_its_replies(serve, ask):
    server = serve(lambda a: reply("five") if sum(server.asked.values()) <= 5 else Answer(500))
    with pytest.raises(RunError, match="does not answer any more"):
        ask(endpoint(server, retries=1, concurrency=2), 30)
    kept = sum(server.paid.values())
    assert kept >= 4
    server.behave = lambda a: reply("five")
    assert set(ask(endpoint(server), 30)) == {"five"}
    assert max(server.paid.values()) == 1


def test_the_key_is_sent_and_stands_nowhere(serve, ask, tmp_path, monkeypatch, capsys):
    key = "sk-very-secret-123"
    monkeypatch.setenv("DOMINIE_TEST_KEY", key)

    def echoing(asked):
        echo = f"Your header was {asked.headers.get('authorization', asked.headers)}"
        return Answer(500, echo) if asked.before == 0 else reply(f"{echo}. five")

    server = serve(echoing)
    found = ask(endpoint(server, key_env="DOMINIE_TEST_KEY"), 2)
    assert found[0].endswith("five")
    server.behave = lambda a: Answer(401, f"bad key {a.headers}")
    with pytest.raises(InputError) as refused:
        ask(endpoint(server, key_env="DOMINIE_TEST_KEY"), 5)
    written = "".join(path.read_text() for path in tmp_path.rglob("*") if path.is_file())
    shown = written + str(refused.value) + "".join(capsys.readouterr())
    assert "[key]" in written
    assert key not in shown


def test_a_signal_waits_for_calls_under_way_and_sends_no_more(serve, ask):
    def amid(asked):
        if sum(server.asked.values()) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return Answer(**{**reply("five").__dict__, "hang": 0.2})

    server = serve(amid)
    handled = []
    before = signal.signal(signal.SIGTERM, lambda *_: handled.append(1))
    try:
        with pytest.raises(RunError, match="interrupted"):
            ask(endpoint(server, concurrency=2, timeout=30.0), 50)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert handled == [1]
    assert 2 <= sum(server.asked.values()) <= 6
    assert len(ask.calls.log.records) == sum(server.asked.values())
    assert signal.getsignal(signal.SIGTERM) == before


def test_what_was_answered_is_never_asked_again(serve, ask):
    server = serve(lambda a: reply("five"))
    ask(endpoint(server), 10)
    assert ask(endpoint(server), 14) == ["five"] * 14
    assert set(server.asked.values()) == {1}
    assert len(server.asked) == 14


def test_one_answer_that_cannot_be_obtained_keeps_no_other_back(serve, ask):
    server = serve(
        lambda a: Answer(400, "context length exceeded") if "It is 3." in a.text else reply("five")
    )
    ask(endpoint(server, concurrency=1), 6)
    (reason,) = ask.calls.failures.values()
    assert reason == "HTTP 400: context length exceeded"
    assert len(ask.calls.log.records) == 6
    assert sum(server.paid.values()) == 5


@pytest.mark.parametrize(
    ("status", "body"),
    [
        (400, "The response was filtered due to Azure OpenAI's content management policy."),
        (400, '{"error": {"code": "content_filter"}}'),
        (403, "Your input was flagged, and this model requires moderation"),
        (422, "blocked by safety settings"),
    ],
)
def test_refusals_of_single_texts_say_nothing_of_the_endpoint(serve, ask, status, body):
    """However many they are, in a row, and with nothing answered: all that a second run asks."""
    server = serve(lambda a: Answer(status, body))
    ask(endpoint(server, concurrency=1), 12)
    assert len(ask.calls.failures) == 12
    assert set(server.asked.values()) == {1}, "the same text is refused again"


def test_calls_run_where_a_loop_runs_already(serve, ask):
    """As in a cell of a notebook, which is run by a loop."""
    server = serve(lambda a: reply(a.text[-1:]))

    async def cell():
        return ask(endpoint(server), 5)

    assert len(asyncio.run(cell())) == 5
    assert len(server.asked) == 5

    async def refused():
        ask(endpoint(server, budget=Budget(calls=6)), 9)

    with pytest.raises(RunError, match="budget is spent"):
        asyncio.run(refused())


def test_an_interrupted_cell_keeps_what_is_under_way(serve, ask):
    under_way: list[str] = []

    def behave(asked):
        under_way.append(asked.text)
        if len(under_way) == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return Answer(**{**reply("five").__dict__, "hang": 1.0})

    server = serve(behave)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)

    async def cell():
        # asyncio's own handler would only cancel the cell, which waits in a thread
        signal.signal(signal.SIGINT, signal.default_int_handler)
        ask(endpoint(server, concurrency=2, timeout=5.0), 8)

    try:
        with pytest.raises(KeyboardInterrupt):
            asyncio.run(cell())
    finally:
        signal.signal(signal.SIGINT, before)
    assert len(ask.calls.log.records) == 2, "the calls under way are waited for, no more are sent"


@pytest.mark.parametrize(
    "variables",
    [
        {"HTTP_PROXY": "http://127.0.0.1:9"},
        {"ALL_PROXY": "socks5://127.0.0.1:9"},
        {"http_proxy": "nonsense://x"},
        {"SSL_CERT_FILE": "/nowhere.pem"},
    ],
)
def test_this_machine_is_reached_past_proxies(serve, ask, monkeypatch, variables):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    server = serve(lambda a: reply("five"))
    assert ask(endpoint(server), 2) == ["five", "five"]
    with pytest.raises(InputError, match=next(iter(variables))):
        ask(endpoint("http://192.0.2.7:9/v1", retries=0, timeout=2.0), 1)
