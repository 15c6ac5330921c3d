"""Settings of an endpoint: what makes no sense is refused, a key is never repeated."""

import pytest

from dominie.core.errors import InputError
from dominie.generation.endpoint import Budget, Endpoint


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
