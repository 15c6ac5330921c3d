"""A chat template is somebody's program: what it may take in time and memory is bounded."""

import itertools
import os
import signal
import sys
import threading
import time

import pytest

from dominie.core.errors import InputError
from dominie.data import chat_template as module
from dominie.data import trial_process
from dominie.data.assistant_spans import text_and_marks, with_written_marks
from dominie.data.chat_template import ChatTemplate, time_limit
from dominie.data.conversations import Conversation
from dominie.data.tokenization import encode_all
from dominie.toyworld.toy_models import word_tokenizer

QUESTION = [{"role": "user", "content": "copy red"}]
LOOP = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"

DEEP = (
    "{% set ns = namespace(a=[1], b=[1]) %}{% for i in range(60) %}"
    "{% set ns.a = [ns.a, ns.a] %}{% set ns.b = [ns.b, ns.b] %}{% endfor %}"
)


def rendered(template, messages=QUESTION):
    tokenizer = word_tokenizer()
    tokenizer.chat_template = template
    return ChatTemplate(tokenizer).text(messages, None, where="d.jsonl:1")


@pytest.fixture
def limits(monkeypatch):
    """A process whose limits and signals must be left alone, and no template tried before."""
    resource = pytest.importorskip("resource")

    def refuse(*args):
        raise AssertionError("a limit of the whole process was changed")

    monkeypatch.setattr(module, "_faults", {})
    monkeypatch.setattr(resource, "setrlimit", refuse)
    before = signal.getsignal(signal.SIGVTALRM)
    yield
    assert signal.getsignal(signal.SIGVTALRM) == before
    assert signal.getitimer(signal.ITIMER_VIRTUAL) == (0.0, 0.0)


@pytest.mark.parametrize(
    ("template", "found"),
    [
        (LOOP, "did not end within 0.3 s"),
        ("{{ 3 ** 99999999 }}", "did not end within 0.3 s"),
        ('{{ "x" * 80000000000 }}', "MemoryError"),
        ('{{ "x".center(80000000000) }}', "MemoryError"),
        ('{{ "x" * 1500000000 }}', "MemoryError"),
        ('{{ "%080000000000d" % 1 }}', "Error"),
        ('{{ "x" * 70000000 }}', "70,000,000 characters"),
        ("{{ messages.__class__.__mro__[1].__subclasses__() }}", "SecurityError"),
        ("{{ cycler.__init__.__globals__.os.system('true') }}", "Error"),
        ("{% include '/etc/passwd' %}", "Error"),
    ],
)
def test_a_hostile_template_is_stopped(monkeypatch, limits, template, found):
    if "0.3 s" in found:
        monkeypatch.setattr(module, "SECONDS", 0.3)
    with pytest.raises(InputError) as refused:
        rendered(template)
    assert "the chat template fails" in str(refused.value)
    assert found in str(refused.value)


def test_a_template_that_takes_too_much_is_named_and_tried_once(monkeypatch, limits):
    calls = []
    render = module.trial.render
    monkeypatch.setattr(module.trial, "render", lambda *a: calls.append(a[4]) or render(*a))
    for _ in range(2):
        with pytest.raises(InputError, match="whatever the conversation") as refused:
            rendered('{{ "x" * 80000000000 }}')
        assert refused.value.where.startswith("tokenizer ")
    assert [len(chats) for chats in calls] == [6]
    assert rendered("{{ messages[0].content }}") == rendered("{{ messages[0].content }}")
    assert [len(chats) for chats in calls] == [6, 6, 1, 1]


def test_each_conversation_is_tried_in_the_child(limits):
    tokenizer = word_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.content }}{% if m.content == 'boom' %}"
        '{{ "x" * 80000000000 }}{% endif %}{% endfor %}'
    )
    chats = [
        Conversation([{"role": "user", "content": text}, {"role": "assistant", "content": "a"}])
        for text in ("red", "boom")
    ]
    with pytest.raises(InputError, match="fails on this conversation") as refused:
        encode_all(tokenizer, chats)
    assert "MemoryError" in refused.value.found


ONE_CALL = {
    "compare": DEEP + "{{ ns.a == ns.b }}",
    "sort": DEEP + "{{ [ns.a, ns.b] | sort }}",
    "hash": "{% set ns = namespace(a=(1,)) %}{% for i in range(60) %}{% set ns.a = (ns.a, ns.a) %}"
    "{% endfor %}{{ {ns.a: 1} }}",
    "digits": "{% set ns = namespace(a=7) %}{% for i in range(40) %}{% set ns.a = ns.a * ns.a %}"
    "{% endfor %}{{ ns.a }}",
}


@pytest.mark.parametrize(
    ("name", "when"), [("compare", "always"), *((name, "later") for name in ONE_CALL)]
)
def test_a_template_that_stays_in_one_call_of_c_is_stopped(monkeypatch, limits, name, when):
    """No exception reaches such a call, and no signal: only a process that has it can be ended."""
    monkeypatch.setattr(module, "SECONDS", 0.2)
    template = ONE_CALL[name]
    if when == "later":
        template = "{% if messages[0].content == 'boom' %}" + template + "{% endif %}fine"
        assert rendered(template) == "fine"
    with pytest.raises(InputError) as refused:
        rendered(template, [{"role": "user", "content": "boom"}])
    assert ("d.jsonl:1" if when == "later" else "tokenizer ") in refused.value.where
    assert "0.2 s" in refused.value.found or "MemoryError" in refused.value.found


@pytest.mark.parametrize("template", ["{{ [1, 2] | random }}", "{{ lipsum() }}"])
def test_a_template_that_draws_at_random_is_refused(limits, template):
    """It could be well behaved in the child alone."""
    with pytest.raises(InputError, match="whatever the conversation") as refused:
        rendered(template)
    assert refused.value.found == trial_process.DRAWN


def test_a_signal_ends_a_process_whose_template_hangs(limits):
    template = ONE_CALL["compare"]

    def stop(*_):
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, stop)
    threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGTERM)).start()
    begun = time.monotonic()
    try:
        with pytest.raises(KeyboardInterrupt):
            rendered(template)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert time.monotonic() - begun < 5
    assert rendered("{{ messages[0].content }}") == "copy red"


@pytest.mark.parametrize("in_thread", [False, True])
def test_what_loops_on_a_later_conversation_alone_is_stopped_too(monkeypatch, limits, in_thread):
    monkeypatch.setattr(module, "SECONDS", 0.3)
    template = "{% if messages[0].content == 'boom' %}" + LOOP + "{% endif %}fine"
    assert rendered(template) == "fine"
    found = []

    def later():
        with pytest.raises(InputError, match="fails on this conversation") as refused:
            rendered(template, [{"role": "user", "content": "boom"}])
        found.append(str(refused.value))

    if in_thread:
        thread = threading.Thread(target=later)
        thread.start()
        thread.join()
    else:
        later()
    assert "did not end within 0.3 s" in found[0]
    assert "d.jsonl:1" in found[0]
    assert rendered(template) == "fine"


def test_only_the_rendering_that_takes_too_long_is_stopped(monkeypatch):
    monkeypatch.setattr(module, "SECONDS", 0.3)
    ended = threading.Event()

    def compute():
        begun = time.thread_time()
        while time.thread_time() - begun < 0.7:
            pass
        ended.set()

    thread = threading.Thread(target=compute)
    thread.start()
    with time_limit():
        time.sleep(0.5)  # no processor time
    thread.join()
    assert ended.is_set()


def test_without_limits_on_this_system_a_template_is_tried_all_the_same(monkeypatch):
    monkeypatch.setitem(sys.modules, "resource", None)
    with module.memory_limit(1):
        assert len(bytearray(2**20))
    monkeypatch.setattr(module, "_faults", {})
    module.trial.close()
    monkeypatch.setattr(sys, "executable", "/nowhere/python")  # not even a child
    assert rendered("{{ messages[0].content }}") == "copy red"


# Marks
CHAT = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "one"}]


def marked(tokenizer, template, messages=CHAT):
    tokenizer.chat_template = template
    text, marks = text_and_marks(ChatTemplate(tokenizer), messages, None, where="x:1")
    return [text[slice(*mark)] for mark in marks]


@pytest.mark.parametrize("family", ["marked", "marked_macro", "marked_last"])
def test_marks_are_where_the_template_sets_them(make_tokenizer, family):
    tokenizer = make_tokenizer(family)
    expected = "one" if family == "marked" else "one<|im_end|>"
    assert marked(tokenizer, tokenizer.chat_template) == [expected]


SIGNS = ["", "-", "+"]


@pytest.mark.parametrize("outer", ["", " ", "\n", "\n  ", " \n\n "])
@pytest.mark.parametrize("inner", ["", " ", "\n", "\n  ", " \n\n "])
def test_writing_the_marks_changes_no_white_space(make_tokenizer, monkeypatch, outer, inner):
    monkeypatch.setattr(module, "in_worker", True)  # 225 templates, and no child for each
    tokenizer = make_tokenizer("marked")
    # The signs of the two tags are independent: each is seen with every other in its place.
    for left, right in itertools.product(SIGNS, repeat=2):
        template = (
            "{% for m in messages %}{{ m['role'] }}"
            f"{outer}{{%{left} generation {right}%}}{inner}{{{{ m['content'] }}}}"
            f"{inner}{{%{right} endgeneration {left}%}}{outer}"
            "{% endfor %}"
        )
        pieces = marked(tokenizer, template)
        assert len(pieces) == 2, template
        assert [piece.strip() for piece in pieces] == ["a", "one"]


def test_a_template_without_marks_is_left_as_it_is():
    template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    assert with_written_marks(template) == template


def test_marks_in_a_captured_block_that_is_cut_are_not_trusted(make_tokenizer):
    template = (
        "{% for m in messages %}{% set text %}"
        "{% generation %} {{ m['content'] }} {% endgeneration %}"
        "{% endset %}{{ text | trim }}{% endfor %}"
    )
    assert marked(make_tokenizer("marked"), template) == []


def test_characters_of_marks_in_a_content_are_no_marks(make_tokenizer):
    tokenizer = make_tokenizer("marked")
    messages = [CHAT[0], {"role": "assistant", "content": "o\ufdd0n\ufdd1e"}]
    assert marked(tokenizer, tokenizer.chat_template, messages) == []
