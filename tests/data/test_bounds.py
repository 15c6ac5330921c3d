"""A chat template is somebody's program: what it may take in time and memory is bounded."""

from __future__ import annotations

import resource
import signal
import time

import pytest

from dominie.core.errors import InputError
from dominie.data import chat_template as bounds
from dominie.data.chat_template import ChatTemplate
from dominie.toyworld.toy_models import word_tokenizer

ASKED = [{"role": "user", "content": "copy red"}]


@pytest.mark.parametrize(
    ("template", "found"),
    [
        ("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", "end"),
        ('{{ "x" * 80000000000 }}', "MemoryError"),
        ('{{ "x".center(80000000000) }}', "MemoryError"),
        ('{{ "%080000000000d" % 1 }}', "Error"),
        ('{{ "x" * 70000000 }}', "70,000,000 characters"),
        ("{{ messages.__class__.__mro__[1].__subclasses__() }}", "SecurityError"),
        ("{{ cycler.__init__.__globals__.os.system('true') }}", "Error"),
        ("{% include '/etc/passwd' %}", "Error"),
    ],
)
def test_a_hostile_template_is_stopped(monkeypatch, template, found):
    if found == "end":
        monkeypatch.setattr(bounds, "SECONDS", 0.3)
    tokenizer = word_tokenizer()
    tokenizer.chat_template = template
    before = resource.getrlimit(resource.RLIMIT_AS), signal.getsignal(signal.SIGVTALRM)
    with pytest.raises(InputError) as refused:
        ChatTemplate(tokenizer).text(ASKED, None, where="d.jsonl:1")
    assert "the chat template fails" in str(refused.value)
    assert found in str(refused.value)
    after = resource.getrlimit(resource.RLIMIT_AS), signal.getsignal(signal.SIGVTALRM)
    assert after == before
    assert signal.getitimer(signal.ITIMER_VIRTUAL) == (0.0, 0.0)


def test_what_is_within_its_bounds_is_let_be():
    with bounds.bounded():
        time.sleep(0.01)
