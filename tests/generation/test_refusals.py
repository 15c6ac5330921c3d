"""What is no reply: one message after the first few, with advice that mends it."""

from __future__ import annotations

import json
import time

import pytest
from fault_server import Answer, reply

from dominie.core.errors import InputError
from dominie.generation.calls import Calls
from dominie.generation.endpoint import Endpoint
from dominie.generation.generator import (
    EndpointGenerator,
    GenerationRequest,
    Sampling,
    generate_all,
)
from dominie.generation.http_client import Outcome
from dominie.generation.refusals import foreign, found_in, refusal, status_inside
from dominie.generation.reply_log import ReplyLog

STREAM = 'data: {"choices": [{"delta": {"content": "M"}}]}\n\ndata: [DONE]\n\n'
CHUNKS = '{"message": {"content": "M"}, "done": false}\n{"message": {"content": ""}}\n'
NATIVE = {"model": "m", "message": {"role": "assistant", "content": "M"}, "done": True}


@pytest.fixture
def ask(tmp_path):
    """Asks a server some questions; returns the texts."""

    def run(server, count=12, path="/v1", **settings):
        url = server.url.removesuffix("/v1") + path
        quick = {"backoff": 0.01, "concurrency": 4, "model": "m", **settings}
        endpoint = Endpoint(endpoint=url, **quick)
        calls = Calls(endpoint, ReplyLog(tmp_path / "l.jsonl"), where="judge", show=print)
        requests = [
            GenerationRequest(
                messages=[{"role": "user", "content": f"It is {i}."}],
                sampling=Sampling(max_new_tokens=50),
            )
            for i in range(count)
        ]
        return [found.text for found in generate_all(EndpointGenerator(calls), requests)]

    return run


@pytest.mark.parametrize(
    ("body", "path", "found", "do"),
    [
        (json.dumps({"error": "Unexpected endpoint. (POST /x)"}), "", "an error", "/v1; some"),
        ("<html><head><title>Chat</title></head></html>", "/v1", "page, 'Chat'", "/api/v1"),
        ("\ufeff\n <!DOCTYPE html><p>Sign in", "/v1", "a web page", "/api/v1"),
        (STREAM, "/v1", "a stream of events", "stream: false"),
        (": PROCESSING\n\n" + STREAM, "/v1", "a stream of events", "stream: false"),
        (CHUNKS, "/api", "a stream of events", "stream: false"),
        (json.dumps(NATIVE), "/api", "an object of model, message, done", "/api/v1; some"),
        ('{"detail": "Not Found"}', "/v2", "an object of detail", "check endpoint"),
        ("it works!", "", "it works!", "/v1; some"),
    ],
)
def test_a_200_that_is_no_reply_is_one_message_after_the_first_few(
    serve, ask, body, path, found, do
):
    server = serve(lambda a: Answer(body=body))
    began = time.monotonic()
    with pytest.raises(InputError, match="something else than chat completions") as refused:
        ask(server, path=path, budget=None, retries=6)
    assert found in str(refused.value)
    assert do in refused.value.do
    assert sum(server.asked.values()) <= 4 * 3
    assert time.monotonic() - began < 2


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({"error": {"message": "Insufficient credits", "code": 402}}, "asks for payment"),
        ({"error": {"message": "No auth", "code": "401"}}, "asks for a key"),
        ([{"error": {"code": 402, "status": "FAILED_PRECONDITION"}}], "asks for payment"),
        ({"choices": [{"error": {"code": 402, "message": "pay"}}]}, "asks for payment"),
    ],
)
def test_an_error_inside_a_200_counts_as_what_it_says(serve, ask, body, words):
    server = serve(lambda a: Answer(body=json.dumps(body)))
    with pytest.raises(InputError, match=words):
        ask(server)
    assert sum(server.asked.values()) <= 4


def test_an_error_inside_a_200_that_passes_is_asked_again(serve, ask):
    choice = {"message": {"content": "The ci"}, "finish_reason": "error", "error": {"code": 502}}
    broken = [{"error": {"code": 503, "message": "loading"}}, {"choices": [choice]}]
    server = serve(
        lambda a: Answer(body=json.dumps(broken[a.before])) if a.before < 2 else reply("Paris")
    )
    assert ask(server, 3) == ["Paris"] * 3


def test_a_page_between_replies_is_asked_again(serve, ask):
    server = serve(
        lambda a: Answer(body="<html>") if "is 2" in a.text and a.before < 2 else reply("five")
    )
    assert ask(server, 6, concurrency=1) == ["five"] * 6


@pytest.mark.parametrize(
    "message",
    [
        {"content": None, "reasoning_content": "Let me think"},
        {"content": "", "reasoning": "Let me think"},
        {},
        {"content": [{"type": "thinking", "thinking": [{"type": "text", "text": "hm"}]}]},
    ],
)
def test_replies_whose_tokens_all_went_into_thoughts(serve, ask, message):
    choice = {"message": message, "finish_reason": "length"}
    server = serve(lambda a: Answer(body=json.dumps({"choices": [choice]})))
    with pytest.raises(InputError, match="replies have no text") as refused:
        ask(server)
    assert "max_tokens" in refused.value.do
    assert sum(server.asked.values()) <= 3 + 4
    server.behave = lambda a: (
        Answer(body=json.dumps({"choices": [choice]})) if ("is 2" in a.text) else reply("five")
    )
    assert ask(server, 4, model="n").count("") == 1  # one is no reason to stop


def test_what_is_text_among_parts_is_joined(serve, ask):
    parts = [
        {"type": "thinking", "thinking": [{"type": "text", "text": "hm"}], "text": "no"},
        {"type": "text", "text": "It is "},
        {"type": "text", "text": "Lyon."},
    ]
    server = serve(lambda a: Answer(body=reply(parts).body))
    assert ask(server, 1) == ["It is Lyon."]


def test_a_server_that_streams_unless_told_otherwise(serve, ask):
    server = serve(
        lambda a: reply("five") if a.body.get("stream") is False else Answer(body=STREAM)
    )
    assert ask(server, 2) == ["five", "five"]


SENT = {
    "model": "m",
    "messages": [],
    "temperature": 0.0,
    "max_tokens": 1,
    "logprobs": True,
    "top_logprobs": 5,
    "reasoning_effort": "low",
    "chat_template_kwargs": {"enable_thinking": False},
}


def advice(status, body, **settings):
    more = {"reasoning_effort": "low", "chat_template_kwargs": {"enable_thinking": False}}
    endpoint = Endpoint(endpoint="http://h/v1", model="m", request=more, **settings)
    body = body if isinstance(body, str) else json.dumps(body)
    outcome = Outcome(status, body)
    return refusal(endpoint, outcome, SENT, where="judge", has_key=True)


def said(message, **more):
    return {"error": {"message": message, **more}}


@pytest.mark.parametrize(
    ("status", "body", "what", "do"),
    [
        (403, said("You are not allowed to request logprobs"), "logprobs", "logprobs: false"),
        (400, said("top_logprobs must be below 5", param="top_logprobs"), "top_", "logprobs: f"),
        (400, [said('Unknown name "logprobs": Cannot find field.')], "logprobs", "logprobs: fal"),
        (400, said("responseLogprobs is not enabled"), "logprobs", "logprobs: false"),
        (
            400,
            said("Unsupported: 'max_tokens'. Use 'max_completion_tokens' instead."),
            "max_tokens",
            "omit: [max_tokens] and request: {max_completion_tokens: N}",
        ),
        (400, said("max_tokens is too large: 9", param="max_tokens"), "max_tokens", "lower it"),
        (400, said("temperature: range: 0..1"), "temperature", "a temperature that it allows"),
        (400, said("`reasoning_effort` is no field"), "reasoning_effort", "remove it in request"),
        (
            400,
            said("enable_thinking must be true, says max_tokens"),
            "chat_template_kwargs",
            "remove it in request",
        ),
        (
            422,
            {"detail": [{"loc": ["body", "logprobs"], "msg": "Extra inputs"}]},
            "logprobs",
            "logprobs: false",
        ),
        (400, {"detail": "Stream must be set to true"}, "stream", "without streaming"),
        (403, said("The project has no access to model m"), "for model m", "check model"),
        (403, said("Forbidden"), "refuses the key", "key"),
        (400, [said("API key not valid. Please pass one.")], "refuses the key", "key"),
        (403, {"error": "Your team has no credits yet"}, "asks for payment", "add credit"),
        (501, said("This server does not support logprobs"), "logprobs", "logprobs: false"),
        (403, "<html>Zscaler</html>", "proxy or firewall", "NO_PROXY"),
        (405, '{"detail": "Method Not Allowed"}', "URL is not that", "/v1 for most"),
        (429, said("Suspended", type="exceeded_current_quota_error"), "for payment", "add credit"),
        (200, {"choices": None, "status_msg": "insufficient balance"}, "for payment", "add credit"),
        (400, said("Its context length is 128 tokens."), "longer than the model's", "lower max_t"),
        (403, said("Country or territory not supported"), "for model m", "do as it says"),
        (307, "leads to http://other/v1", "leads to another", "a server you trust"),
        (200, said("The model is overloaded"), "answers with an error", "run again later"),
        (200, {"error": "model 'm' not found"}, "answers with an error", "check model"),
        (400, said("Something else is wrong"), "for model m", "request: {FIELD: VALUE}"),
    ],
)
def test_advice_names_what_is_at_fault(status, body, what, do):
    error = advice(status, body)
    assert what in error.what
    assert do in error.do


def test_a_refusal_of_one_question_after_others_were_answered_is_not_about_the_key(serve, ask):
    server = serve(lambda a: Answer(403, "not this one") if "is 3" in a.text else reply("five"))
    assert ask(server, 6, concurrency=1) == ["five"] * 3 + [""] + ["five"] * 2


@pytest.mark.parametrize(
    "body", ["", "nonsense", '{"choices": []}', '{"choices": [{}]}', "[" * 100_000, "7", "null"]
)
def test_what_may_be_a_broken_reply_is_not_foreign(body):
    assert foreign(body) is None
    assert status_inside(body) is None


@pytest.mark.parametrize(
    "error",
    [
        {"message": "Content Exists Risk"},
        {"code": "1301", "message": "\u53ef\u80fd\u5305\u542b\u654f\u611f\u5185\u5bb9"},
        {"message": "rejected because it was considered high risk"},
        {"code": "data_inspection_failed", "message": "Not passed"},
        {"message": "Unsafe: S12"},
        {"message": "violates usage guidelines"},
    ],
)
def test_content_filters_of_several_vendors_refuse_a_question_and_not_the_model(serve, ask, error):
    refused = Answer(400, json.dumps({"error": error}))
    server = serve(lambda a: reply("five") if "is 11" in a.text else refused)
    assert ask(server, concurrency=1) == [""] * 11 + ["five"]


def test_what_a_server_says_is_shown_in_its_own_script():
    said_there = json.dumps({"error": "\u4f59\u989d \ud83d"})
    assert found_in(Outcome(400, said_there)) == 'HTTP 400: {"error": "\u4f59\u989d \ufffd"}'


def test_a_server_that_leads_elsewhere_is_not_followed(serve, ask):
    server = serve(lambda a: Answer(308, "", {"location": "http://127.0.0.1:1/v1/x"}))
    with pytest.raises(InputError, match=r"leads to http://127\.0\.0\.1:1/v1/x"):
        ask(server)


def test_a_long_wait_is_told_once(serve, tmp_path, monkeypatch):
    monkeypatch.setattr("dominie.generation.calls._LONG_WAIT", 0.01)
    server = serve(
        lambda a: reply("five") if a.before > 1 else Answer(429, "slow", {"retry-after": "0.02"})
    )
    told: list[str] = []
    endpoint = Endpoint(endpoint=server.url, model="m", backoff=0.0)
    calls = Calls(endpoint, ReplyLog(tmp_path / "l.jsonl"), where="judge", show=told.append)
    request = GenerationRequest(
        messages=[{"role": "user", "content": "2 + 3?"}], sampling=Sampling(max_new_tokens=9)
    )
    assert generate_all(EndpointGenerator(calls), [request])[0].text == "five"
    assert len(told) == 1
    assert "HTTP 429: slow" in told[0]
