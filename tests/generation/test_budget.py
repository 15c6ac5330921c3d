"""A budget of money is kept, whatever bounds replies and however tokens are counted."""

from __future__ import annotations

import json

import pytest
from fault_server import Answer, reply

from dominie.core.errors import RunError
from dominie.generation.budget import BudgetTracker
from dominie.generation.calls import Calls
from dominie.generation.endpoint import Budget, Endpoint, Price
from dominie.generation.generator import (
    EndpointGenerator,
    GenerationRequest,
    Sampling,
    generate_all,
)
from dominie.generation.reply_log import ReplyLog

PRICE = Price(input=10.0, output=40.0)


def counted(prompt, completion, total=None):
    tree = json.loads(reply("five").body)
    tree["usage"] = {"prompt_tokens": prompt, "completion_tokens": completion}
    if total is not None:
        tree["usage"]["total_tokens"] = total
    return Answer(body=json.dumps(tree))


@pytest.fixture
def spend(tmp_path):
    """Asks 40 questions within a budget; returns what was spent by the log."""

    def run(server, money, text="It is {}.", **settings):
        endpoint = Endpoint(
            endpoint=server.url, model="m", price=PRICE, budget=Budget(money=money), **settings
        )
        calls = Calls(endpoint, ReplyLog(tmp_path / "l.jsonl"), where="judge", show=print)
        requests = [
            GenerationRequest(
                messages=[{"role": "user", "content": text.format(i)}],
                sampling=Sampling(max_new_tokens=100),
            )
            for i in range(40)
        ]
        with pytest.raises(RunError, match="the budget is spent"):
            generate_all(EndpointGenerator(calls), requests)
        return sum(record["cost"] for record in calls.log.records)

    return run


@pytest.mark.parametrize(
    ("answer", "settings", "text"),
    [
        (counted(5, 7000), {"request": {"max_completion_tokens": 8000}}, "It is {}."),
        (
            counted(5, 7000),
            {"request": {"max_completion_tokens": 8000}, "omit": ["max_tokens"]},
            "It is {}.",
        ),
        (counted(5, 7000), {}, "It is {}."),  # the server ignores the bound
        (counted(5, 10, total=7015), {}, "It is {}."),  # thoughts are billed, and counted apart
        (counted(9000, 10), {}, "{}" + "ဗမာ" * 300),  # ten tokens for each letter
    ],
)
def test_a_budget_of_money_is_never_overspent(serve, spend, answer, settings, text):
    server = serve(lambda a: answer)
    assert 0 < spend(server, 1.0, text, **settings) <= 1.0


def test_a_server_that_counts_nothing_is_still_asked_several_at_once(serve, spend):
    body = json.dumps({"choices": [{"message": {"content": "five"}}]})
    server = serve(lambda a: Answer(body=body, hang=0.03))
    assert 0 < spend(server, 0.1) <= 0.1
    assert server.most_at_once > 1


@pytest.mark.parametrize("bound", [None, -1, 0, "8000", True])
def test_a_budget_of_money_needs_a_bound_on_replies(bound):
    there = {"endpoint": "http://h/v1", "model": "m", "price": PRICE, "budget": Budget(money=1.0)}
    for settings in ({"omit": ["max_tokens"]}, {"request": {"max_tokens": bound}}):
        with pytest.raises(ValueError, match="bound on the length of replies"):
            Endpoint(**there, **settings)
    Endpoint(**there, omit=["max_tokens"], request={"max_completion_tokens": 100})


def test_what_costs_nothing_is_not_counted_and_what_had_no_price_is():
    endpoint = Endpoint(endpoint="http://h/v1", model="m", price=PRICE, budget=Budget(calls=9))
    request = {"messages": [{"role": "user", "content": "x" * 300}], "max_tokens": 1000}
    records = [
        {"status": 200, "body": "<html>", "request": request, "cost": None},
        {"status": 402, "body": "{}", "request": request, "cost": 0.0},
        {"status": 200, "body": counted(100, 200).body, "request": request, "cost": None},
        {"status": 0, "body": "timed out", "request": request, "cost": None},
    ]
    found = BudgetTracker(endpoint, records, where="judge")
    assert found.calls == 2
    assert found.money == pytest.approx(PRICE.of(100, 200) + PRICE.of(100, 1000))
