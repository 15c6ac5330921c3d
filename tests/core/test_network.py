"""Variables for proxies and certificates: the one at fault is named, its password is not."""

from __future__ import annotations

import os

import pytest

from dominie.core.errors import InputError, OutOfReach, hub_error
from dominie.core.network import check_variables, is_loopback, through_proxy


@pytest.fixture(autouse=True)
def bare(monkeypatch):
    for name in list(os.environ):
        if name.lower().endswith("_proxy") or name.startswith("SSL_CERT"):
            monkeypatch.delenv(name)


@pytest.mark.parametrize(
    ("host", "here"),
    [
        ("localhost", True),
        ("LOCALHOST.", True),
        ("api.localhost", True),
        ("127.0.0.1", True),
        ("127.8.9.1", True),
        ("::1", True),
        ("[::1]", True),
        ("::ffff:127.0.0.1", True),
        ("0.0.0.0", True),
        ("10.0.0.1", False),
        ("localhost.example.org", False),
        ("", False),
    ],
)
def test_what_this_machine_is_called(host, here):
    assert is_loopback(host) is here


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("SSL_CERT_FILE", "/nowhere/ca.pem"),
        ("SSL_CERT_FILE", __file__),  # a file, and no certificate in it
        ("SSL_CERT_DIR", "/nowhere"),
        ("HTTPS_PROXY", "ftp://proxy:3128"),
        ("https_proxy", "http://proxy:port"),
        ("HTTP_PROXY", "://"),
        ("ALL_PROXY", "socks4://proxy:1080"),
        ("all_proxy", "http://user:hunter2@:3128"),
    ],
)
def test_the_variable_at_fault_is_named(monkeypatch, name, value):
    monkeypatch.setenv(name, value)
    with pytest.raises(InputError) as raised:
        check_variables()
    assert name in raised.value.where
    assert value.rpartition("@")[2] in raised.value.found
    assert "hunter2" not in str(raised.value)
    with pytest.raises(InputError, match=name):
        hub_error(FileNotFoundError(2, "No such file or directory"))


def test_socks_needs_its_package(monkeypatch):
    monkeypatch.setenv("ALL_PROXY", "socks5://me:hunter2@proxy:1080")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"ALL_PROXY(?s:.*)pip install socksio") as raised:
        check_variables()
    assert "hunter2" not in str(raised.value)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    check_variables()


def test_what_works_is_accepted_and_said(monkeypatch):
    check_variables()
    assert through_proxy("https://example.org/v1") == ""
    monkeypatch.setenv("HTTPS_PROXY", "http://me:hunter2@proxy:3128")
    monkeypatch.setenv("NO_PROXY", "inside.example.org")
    check_variables()
    said = through_proxy("https://example.org/v1")
    assert said == " (through HTTPS_PROXY: http://proxy:3128)"
    for past in ("http://example.org", "https://127.0.0.1:1", "https://inside.example.org"):
        assert through_proxy(past) == ""
    assert hub_error(ConnectionError()) is OutOfReach
