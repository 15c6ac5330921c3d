"""Settings of an endpoint: what makes no sense is refused, a key is never repeated."""

import html
import json
import urllib.parse

import pytest
from fault_server import Answer, reply

from dominie.core.errors import InputError
from dominie.generation.calls import Calls
from dominie.generation.endpoint import Budget, Endpoint
from dominie.generation.generator import (
    EndpointGenerator,
    GenerationRequest,
    Sampling,
    generate_all,
)
from dominie.generation.http_client import Client
from dominie.generation.reply_log import ReplyLog


@pytest.mark.parametrize("value", [None, "", "two\nlines", "clé"])
def test_a_key_that_is_not_there(monkeypatch, value):
    monkeypatch.delenv("DOMINIE_TEST_KEY", raising=False)
    if value is not None:
        monkeypatch.setenv("DOMINIE_TEST_KEY", value)
    endpoint = Endpoint(endpoint="http://h/v1", model="m", key_env="DOMINIE_TEST_KEY")
    with pytest.raises(InputError, match="DOMINIE_TEST_KEY"):
        endpoint.key(where="judge")


@pytest.mark.parametrize(
    "settings",
    [
        {"endpoint": "localhost:8000"},
        {"endpoint": "ftp://h/v1"},
        {"endpoint": "http://user:password@h/v1"},
        {"endpoint": "http://h/v1?key=1"},
        {"model": " "},
        {"key_env": "hf_abcdefg"},
        {"key_env": "sk-ABC"},
        {"concurrency": 0},
        {"timeout": 0.0},
        {"timeout": float("nan")},
        {"retries": -1},
        {"budget": Budget(money=1.0)},
    ],
)
def test_settings_that_make_no_sense(settings):
    with pytest.raises(ValueError, match=r".{10}"):
        Endpoint(**{"endpoint": "http://h/v1", "model": "m", **settings})


@pytest.mark.parametrize(
    ("request_", "place"),
    [
        ({"api-key": "abc"}, "request.api-key"),
        ({"extra_headers": {"X-Api-Key": "abc"}}, "request.extra_headers.X-Api-Key"),
        ({"extra_headers": {"X": "Bearer abcdefgh1234"}}, "request.extra_headers.X"),
        ({"provider": [{"auth": {"token": "abc"}}]}, "request.provider.auth.token"),
        ({"user": "sk-proj-abcdefgh1234"}, "request.user"),
        ({"metadata": {"a": ["x", "hf_AbCdEfGhIjKlMnOpQrSt"]}}, "request.metadata.a"),
    ],
)
def test_a_secret_anywhere_in_a_request_is_refused_and_not_repeated(request_, place):
    with pytest.raises(ValueError, match="looks like a secret") as refused:
        Endpoint(endpoint="http://h/v1", model="m", request=request_)
    assert str(refused.value).startswith(place)
    assert "abc" not in str(refused.value)


def test_fields_that_are_no_secret():
    fields = {
        "max_completion_tokens": 5,
        "stop_token_ids": [2],
        "avoid_tokens": ["x"],
        "prompt_cache_key": "judge",
        "chat_template_kwargs": {"enable_thinking": False},
        "response_format": {"schema": {"properties": {"password": {"type": "string"}}}},
    }
    assert Endpoint(endpoint="http://h/v1", model="m", request=fields).request == fields


KEY = "sk-pr/oj+a&b\"<x>'=:1"


def in_html(text):
    return "".join(f"&#x{ord(sign):x};" for sign in text)


@pytest.mark.parametrize(
    "written",
    [
        KEY,
        json.dumps(KEY),
        json.dumps(json.dumps({"raw": KEY})),
        json.dumps(KEY).replace("/", "\\/"),
        "".join(f"\\u{ord(sign):04X}" for sign in KEY),
        json.dumps("".join(f"\\u{ord(sign):04x}" for sign in KEY)),
        html.escape(KEY),
        html.escape(html.escape(KEY)),
        in_html(KEY),
        html.escape(in_html(KEY)),
        urllib.parse.quote(KEY, safe=""),
        urllib.parse.quote(urllib.parse.quote(KEY, safe=""), safe="").lower(),
    ],
)
def test_a_key_that_a_server_sends_back_escaped_is_not_kept(written):
    client = Client(Endpoint(endpoint="http://h/v1", model="m"), KEY)
    shown = client.redacted(f"You sent {written}.")
    assert "[key]" in shown
    for _ in range(3):
        shown = html.unescape(urllib.parse.unquote(shown)).replace("\\", "")
    assert KEY not in shown
    assert KEY[:8] not in shown


def test_what_stands_in_for_a_key_is_a_word_of_replies():
    client = Client(Endpoint(endpoint="http://h/v1", model="m"), "ollama")
    assert client.redacted("I like ollama.") == "I like ollama."


def test_a_reply_with_an_escaped_key_has_it_in_no_file(serve, tmp_path, monkeypatch):
    monkeypatch.setenv("DOMINIE_TEST_KEY", "sk-very/secret-123")
    echo = reply("five").body.replace("five", "Your key is \\u0073k-very\\/secret-123")
    server = serve(lambda asked: Answer(body=echo))
    there = Endpoint(endpoint=server.url, model="m", key_env="DOMINIE_TEST_KEY")
    calls = Calls(there, ReplyLog(tmp_path / "l.jsonl"), where="judge", show=print)
    request = GenerationRequest(
        messages=[{"role": "user", "content": "x"}], sampling=Sampling(max_new_tokens=9)
    )
    (found,) = generate_all(EndpointGenerator(calls), [request])
    assert found.text == "Your key is [key]"
    assert "secret-123" not in (tmp_path / "l.jsonl").read_text()


@pytest.mark.parametrize(
    "wait",
    [
        "Mon, 99999999999999999999999 Jan 2020 00:00:00 GMT",
        "Fri, 31 Dec 2999 23:59:59 +999999999999999999999999",
        "Fri, 31 Dec 99999 23:59:59 GMT",
        "9" * 400,
        "soon",
    ],
)
def test_a_retry_after_that_is_no_date(serve, tmp_path, wait):
    server = serve(lambda a: reply("five") if a.before else Answer(429, "", {"retry-after": wait}))
    there = Endpoint(endpoint=server.url, model="m", backoff=0.0)
    calls = Calls(there, ReplyLog(tmp_path / "l.jsonl"), where="judge", show=print)
    request = GenerationRequest(
        messages=[{"role": "user", "content": "x"}], sampling=Sampling(max_new_tokens=9)
    )
    (found,) = generate_all(EndpointGenerator(calls), [request])
    assert found.text == "five"


def test_a_key_in_place_of_its_variable_is_not_repeated():
    with pytest.raises(ValueError, match="never the key itself") as refused:
        Endpoint(endpoint="http://h/v1", model="m", key_env="sk-SECRET")
    assert "SECRET" not in str(refused.value)


@pytest.mark.parametrize("bad", [{"calls": 0}, {"money": 0.0}, {"calls": -3}, {"money": 1e999}])
def test_a_budget_of_nothing(bad):
    with pytest.raises(ValueError, match="buys nothing"):
        Budget(**bad)


def test_servers_that_want_other_fields():
    there = {"endpoint": "http://h/v1", "model": "m"}
    changed = {"request": {"max_completion_tokens": 7}, "omit": ["max_tokens", "temperature"]}
    body = Endpoint(**there, **changed).body([], {"temperature": 0.0, "max_tokens": 9})
    assert set(body) == {"model", "messages", "max_completion_tokens"}
    for bad in ({"omit": ["messages"]}, {"request": {"stream": True}}):
        with pytest.raises(ValueError, match="no field to change"):
            Endpoint(**there, **bad)
