"""Errors print four labelled lines, and a hub that does not answer is not the user's fault."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from dominie.core import errors
from dominie.core.errors import InputError, OutOfReach, RunError, hub_error, nearest


def test_an_error_prints_where_expected_found_and_do():
    error = InputError("no such key", where="train.stpes", expected="steps", found="3", do="rename")
    assert str(error) == (
        "train.stpes: no such key\n  expected  steps\n  found     3\n  do        rename"
    )
    assert str(error.within("stages.align")).startswith("stages.align.train.stpes: no such key\n")
    assert str(InputError("odd").within("a")) == "a: odd"
    assert (InputError.exit_status, OutOfReach.exit_status, RunError.exit_status) == (2, 2, 1)


@pytest.mark.parametrize(
    "secret",
    [
        "sk-proj-8Qm4abcdefgh",
        "hf_UTJrzVwqkDnYxaAbCdEf",
        "Bearer abcdefgh.1234",
        "judge.api_key=anything",
        "hf_token=anything",
    ],
)
def test_no_message_repeats_a_secret(secret):
    error = InputError("not an override", where=secret, found=f"the text '{secret}'", do=secret)
    value = secret.rpartition("=")[2].rpartition(" ")[2]
    assert value not in str(error.within("r.yaml"))
    assert str(error).count("[hidden]") == 3


def test_what_is_no_secret_is_shown():
    plain = "hf_hub_download, task-rating, max_tokens=5, key_env: the key is missing, eos_token=<s>"
    assert plain in str(InputError(plain))


class TransportError(Exception):
    """Named as the HTTP client's."""


def answered(status: int, name: str = "HTTPStatusError") -> Exception:
    error = type(name, (Exception,), {})("refused")
    error.response = SimpleNamespace(status_code=status)
    return error


def caused_by(cause: Exception) -> Exception:
    error = OSError("cannot load")
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (ConnectionError(), OutOfReach),
        (caused_by(TimeoutError()), OutOfReach),
        (caused_by(type("ConnectError", (TransportError,), {})()), OutOfReach),
        (type("LocalEntryNotFoundError", (OSError,), {})(), OutOfReach),
        (answered(503), OutOfReach),
        (answered(403, "HfHubHTTPError"), OutOfReach),
        (answered(403, "GatedRepoError"), InputError),
        (answered(404, "HfHubHTTPError"), InputError),
        (ValueError("no such model"), InputError),
    ],
)
def test_a_hub_error_is_the_user_s_only_if_the_hub_answered(error, expected):
    assert hub_error(error) is expected


KEYS = ["learning_rate", "batch", "micro_batch", "steps", "patience", "precision", "lora", "alpha"]


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("learnig_rate", "learning_rate"),
        ("Learning-Rate", "learning_rate"),
        ("batch_size", "batch"),
        ("step", "steps"),
        ("stpes", "steps"),
        ("precison", "precision"),
        ("lora_alpha", "alpha"),
        ("balance", None),  # shares letters with patience, and no more
        ("valence", None),
        ("prediction", None),
        ("targets", None),
        ("optimizer", None),
        ("share", None),
        ("", None),
        (7, None),
    ],
)
def test_advice_names_what_is_alike_and_nothing_else(written, meant):
    assert nearest(written, KEYS) == meant
    assert nearest(written, []) is None


def test_all_advice_asks_the_same_function():
    sources = Path(errors.__file__).parents[1].rglob("*.py")
    assert [p.name for p in sources if "difflib" in p.read_text("utf-8")] == ["errors.py"]
