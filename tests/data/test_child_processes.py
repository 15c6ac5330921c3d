"""Several processes tokenise as one does: the same rows, the same errors, and none is left over."""

import json
import os
import signal
import subprocess
import sys

import psutil
import pytest

from dominie.core.errors import InputError, RunError
from dominie.data import child_processes as module
from dominie.data import rows
from dominie.data.child_processes import encode_batches
from dominie.data.conversations import Conversation
from dominie.data.rows import prepare
from dominie.data.sources import Source
from dominie.toyworld.toy_models import word_tokenizer


@pytest.fixture(autouse=True)
def small_batches(monkeypatch):
    """Other processes from the second batch of eight on."""
    monkeypatch.setattr(module, "SERIAL_BATCHES", 0)
    monkeypatch.setattr(rows, "_BATCH_ROWS", 8)


def line(number, prompt="red"):
    return json.dumps({"prompt": f"copy {prompt} {number}", "completion": f"{prompt} {number}"})


def source_of(folder, lines, test_fraction=0.0):
    path = folder / "rows.jsonl"
    path.write_text("\n".join(lines))
    return Source(name="rows", path=str(path), test_fraction=test_fraction)


def prepared(source, folder, processes, tokenizer=None):
    return prepare(
        {source.name: source},
        tokenizer or word_tokenizer(),
        max_length=16,
        cache=folder / f"cache{processes}",
        processes=processes,
    )[source.name]


def children():
    """The processes of this test process that tokenise, by id."""
    found = subprocess.run(
        ["ps", "-ww", "-eo", "pid=,ppid=,args="], capture_output=True, text=True, check=True
    ).stdout.splitlines()
    return [
        int(fields[0])
        for fields in map(str.split, found)
        if "import tokenise" in " ".join(fields) and int(fields[1]) in (os.getpid(), 1)
    ]


def test_rows_and_their_order_are_those_of_one_process(tmp_path):
    lines = [line(n, "red blue " * (n % 7 + 1)) for n in range(100)]
    source = source_of(tmp_path, [*lines, *lines[:9]], 0.2)
    one, two = (prepared(source, tmp_path, processes) for processes in (1, 2))
    assert two.summary == one.summary
    assert two.summary.truncated > 0
    for split in ("train", "validation", "test"):
        assert getattr(two, split).digest == getattr(one, split).digest
    assert children() == []


BAD = [
    json.dumps(
        {"messages": [{"role": "tool", "content": "a"}, {"role": "assistant", "content": "b"}]}
    ),
    json.dumps({"prompt": "alone"}),
]


@pytest.mark.parametrize("bad", [BAD, BAD[::-1]])
def test_the_error_is_that_of_one_process(tmp_path, bad):
    """The first at fault is named: by the template in another process, or by the reader here."""
    lines = [line(n) for n in range(60)]
    for at, row in zip((20, 31), bad, strict=False):
        lines.insert(at, row)
    source = source_of(tmp_path, lines)
    found = []
    for processes in (1, 2):
        with pytest.raises(InputError) as caught:
            prepared(source, tmp_path, processes)
        found.append(str(caught.value))
    assert found[0] == found[1]
    assert "rows.jsonl:21" in found[0]
    assert children() == []


def chats(*contents):
    return [
        Conversation(
            [{"role": "user", "content": content}, {"role": "assistant", "content": "red"}],
            where=f"d.jsonl:{number}",
        )
        for number, content in enumerate(contents, 1)
    ]


def test_what_a_template_takes_later_is_limited_where_it_is_rendered():
    tokenizer = word_tokenizer()
    tokenizer.chat_template = tokenizer.chat_template + (
        "{% if messages[0].content == 'boom' %}{{ messages[0].content * 500000000 }}{% endif %}"
    )
    batches = ([("a", chat)] for chat in chats("red", "blue", "boom"))
    with pytest.raises(InputError, match="MemoryError") as caught:
        list(encode_batches(tokenizer, batches, processes=2))
    assert caught.value.where == "d.jsonl:3"


def test_a_few_batches_are_read_ahead_and_no_more():
    read = 0

    def batches():
        nonlocal read
        for read, chat in enumerate(chats(*["red"] * 60), 1):
            yield [(read, chat)]

    for [(number, _)] in encode_batches(word_tokenizer(), batches(), processes=2):
        assert read <= number + 2 * 2


def test_a_process_that_is_killed_is_an_error(monkeypatch):
    def batches():
        for number, chat in enumerate(chats(*["red"] * 40)):
            if number == 8:
                os.kill(children()[0], signal.SIGKILL)
            yield [(number, chat)]

    with pytest.raises(RunError, match="a process that tokenises conversations ended") as caught:
        list(encode_batches(word_tokenizer(), batches(), processes=2))
    assert "exit status -9" in caught.value.found
    assert caught.value.where.startswith("conversations from d.jsonl:")
    assert children() == []


@pytest.mark.parametrize("reduce", [lambda self: (eval, ("nowhere",)), lambda self: 1 / 0])
def test_a_tokenizer_that_cannot_be_copied_is_used_in_this_process(monkeypatch, caplog, reduce):
    tokenizer = word_tokenizer()
    monkeypatch.setattr(type(tokenizer), "__reduce__", reduce)
    batches = ([(n, chat)] for n, chat in enumerate(chats(*["red"] * 20)))
    encoded = list(encode_batches(tokenizer, batches, processes=2))
    assert [tag for [(tag, _)] in encoded] == list(range(20))
    assert "tokenising in one process: the tokenizer cannot be copied" in caplog.text
    assert children() == []


SCRIPT = """
import signal, sys, time
from pathlib import Path
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
from dominie.data import child_processes, rows
from dominie.data.sources import Source
from dominie.toyworld.toy_models import word_tokenizer

print("main", flush=True)
child_processes.SERIAL_BATCHES = 0
rows._BATCH_ROWS = 8

def progress(name, read):
    if sys.argv[2:] and read > 100:
        print("waiting", flush=True)
        time.sleep(60)

made = rows.prepare(
    {"rows": Source(name="rows", path=sys.argv[1])}, word_tokenizer(),
    max_length=16, cache=Path(sys.argv[1]).parent / "cache", processes=2, progress=progress,
)
print(len(made["rows"].train), flush=True)
"""


def script(tmp_path, *arguments):
    source = source_of(tmp_path, [line(n) for n in range(2000)])
    path = tmp_path / "script.py"
    path.write_text(SCRIPT)
    return subprocess.Popen(
        [sys.executable, path, source.path, *arguments],
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def test_a_script_without_a_guard_runs_once(tmp_path):
    out, _ = script(tmp_path).communicate(timeout=120)
    assert out.split() == ["main", "2000"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_no_process_outlives_one_that_is_stopped(tmp_path, number):
    process = script(tmp_path, "wait")
    assert process.stdout.readline() == "main\n"
    assert process.stdout.readline() == "waiting\n"
    workers = psutil.Process(process.pid).children()
    assert len(workers) == 3  # two that tokenise, and the one that tries the template
    if number == signal.SIGINT:  # as a terminal does it: to all of them
        os.killpg(process.pid, number)
    else:
        process.kill()
    process.wait(timeout=30)
    _, alive = psutil.wait_procs(workers, timeout=120)  # they end when they have imported all
    assert alive == []
