"""A child process that does first what a template or a tokenizer of somebody else asks for.

A template may stay inside one call of C for years, a tokenizer may abort its process: neither can
be stopped from within. The child has limits that the system enforces, and this process goes on.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from datetime import datetime
from functools import cache
from hashlib import blake2b
from typing import TYPE_CHECKING, Any

from dominie.core.errors import InputError
from dominie.data.child_processes import child_command, processor_limit

if TYPE_CHECKING:
    from pathlib import Path

LOADING_SECONDS = 20.0
"""Of processor time for loading a tokenizer and tokenising short texts; the largest take 2."""
LOADING_BYTES = 2**32
"""Of memory for loading it."""
TEXT_BYTES = 2**29
"""Of memory for tokenising the texts, which take 10 MiB."""
MOST_TOKENS = 2**24
"""Ids are smaller than this: 16 times as many as the largest vocabularies have."""
_GROWTH = 100  # times as long a text may become, and a few more; ligatures become 18 letters

SLOW = "it did not end within {:g} s"
DRAWN = "it draws at random, and may do something else when it counts"


class Trial:
    """The child process: started at its first use, and again after something has ended it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._owner = 0
        self._sent: dict[str, int] = {}  # templates that the child has, by number

    def start(self) -> None:
        """Start the child, and do not wait until it is ready."""
        if self._process is not None and self._owner == os.getpid():
            return
        self._process = None  # after a fork it is the parent's
        with contextlib.suppress(OSError):  # without a child nothing is tried
            self._process = subprocess.Popen(
                **child_command("serve", module=__name__), stderr=subprocess.DEVNULL
            )
            self._owner, self._sent = os.getpid(), {}

    def render(self, source: str, seconds: float, size: int, *arguments: Any) -> str | None:
        """Let the child render a template, which it is sent once; see `ask`."""
        with self._lock:
            self.start()
            known, number = source in self._sent, self._sent.setdefault(source, len(self._sent))
            text = None if known else source
            return self._ask("template", seconds, size, number, text, *arguments)

    def ask(self, kind: str, seconds: float, size: int, *arguments: Any) -> str | None:
        """Let the child do something.

        Args:
            kind: a key of `_KINDS`.
            seconds: of processor time that it may take.
            size: bytes of memory that it may take beyond what the child has.
            arguments: of the function, as JSON knows them.

        Returns:
            What is wrong with that; None if nothing is, or if no child can be started.
        """
        with self._lock:
            self.start()
            return self._ask(kind, seconds, size, *arguments)

    def _ask(self, kind: str, seconds: float, size: int, *arguments: Any) -> str | None:
        request = json.dumps([kind, seconds, size, *arguments], default=str).encode() + b"\n"
        if self._process is None:
            return None
        try:
            reply = self._reply(self._process, request)
        except BaseException:  # a signal's: what comes next would be the reply to this
            self.close()
            raise
        if reply.endswith(b"\n"):
            found = json.loads(reply)
            return None if found is None else str(found)
        status = self._process.wait()
        self.close()
        if status == -getattr(signal, "SIGPROF", 0):
            return SLOW.format(seconds)
        return f"it ended the process that tried it, with status {status} (of a signal if negative)"

    def _reply(self, process: subprocess.Popen[bytes], request: bytes) -> bytes:
        assert process.stdin is not None
        assert process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            process.stdin.write(request)
            process.stdin.flush()
        return process.stdout.readline()

    def close(self) -> None:
        """End the child, whatever it is doing."""
        process, self._process = self._process, None
        if process is not None and self._owner == os.getpid():
            process.kill()
            with contextlib.suppress(OSError):
                process.communicate()  # closes the pipes


trial = Trial()
atexit.register(trial.close)
_tried: dict[str, str | None] = {}  # content of a tokenizer -> what is wrong with it


def check_tokenizer(place: str, revision: str | None, file: Path | None) -> None:
    """Let the child load a tokenizer and tokenise short texts, once for each content.

    Args:
        place: a folder or a hub id.
        revision: on the hub.
        file: its tokenizer.json; None if it has none.

    Raises:
        InputError: that takes too much time or memory, or ends the process.
    """
    if file is None:
        key, path = f"{place} {revision}", place
    else:
        key, path = blake2b(file.read_bytes()).hexdigest(), str(file.absolute())
    if key not in _tried:
        _tried[key] = trial.ask("tokenizer", LOADING_SECONDS, LOADING_BYTES, path, revision)
    if found := _tried[key]:
        raise InputError(
            "the tokenizer cannot be used safely",
            where=place,
            expected=f"ids below {MOST_TOKENS:,}, and short texts tokenised within "
            f"{LOADING_SECONDS:g} s and {TEXT_BYTES >> 20:,} MiB",
            found=found,
            do="use the tokenizer of the model that this one was made from",
        )


# In the child


def serve() -> None:
    """Do what is asked for on standard input, until it is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # of the terminal; the parent ends this process
    replies = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a library prints is no reply
    for line in sys.stdin.buffer:
        kind, seconds, size, *arguments = json.loads(line)
        limits = _limits(seconds, size)
        try:
            found = _KINDS[kind](limits, *arguments)
        except MemoryError:
            found = "MemoryError"
        with contextlib.suppress(BrokenPipeError):
            replies.write(json.dumps(found).encode() + b"\n")
            replies.flush()


@contextlib.contextmanager
def _limits(seconds: float, size: int) -> Iterator[None]:
    from dominie.data.chat_template import memory_limit

    with memory_limit(size), processor_limit(seconds):
        yield


class _Drawn(BaseException):
    """A template asked for something at random."""


@cache
def _environment() -> Any:
    """Names and settings are those that transformers gives to chat templates."""
    from jinja2.exceptions import TemplateError
    from jinja2.ext import Extension
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Any) -> Any:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    def raise_exception(message: str) -> None:
        raise TemplateError(message)

    def drawn(*_: Any, **__: Any) -> None:
        raise _Drawn

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = lambda value, **options: json.dumps(
        value, **{"ensure_ascii": False} | options
    )
    environment.filters["random"] = environment.globals["lipsum"] = drawn
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment


_sources: dict[int, str] = {}
_compiled: dict[int, Any] = {}


def _render(
    limits: contextlib.AbstractContextManager[None],
    number: int,
    source: str | None,
    variables: dict[str, Any],
    chats: list[Any],
    characters: int,
) -> str | None:
    """Render messages with tools, with or without a generation prompt."""
    if source is not None:
        _sources[number] = source
    environment = _environment()
    with limits:
        if number not in _compiled:
            try:
                _compiled[number] = environment.from_string(_sources[number])  # computes constants
            except MemoryError:
                raise
            except _Drawn:
                return DRAWN
            except Exception:  # no template: the parent finds that too
                return None
        for messages, tools, prompt in chats:
            given = {"messages": messages, "tools": tools, "add_generation_prompt": prompt}
            try:
                text = _compiled[number].render(**{"documents": None} | variables | given)
            except MemoryError:
                raise
            except _Drawn:
                return DRAWN
            except Exception:  # it refuses this conversation
                continue
            if len(text) > characters:
                return f"it writes {len(text):,} characters"
    return None


def _load(
    limits: contextlib.AbstractContextManager[None], path: str, revision: str | None
) -> str | None:
    """Load a tokenizer from tokenizer.json, or as transformers does from what else there is."""
    from dominie.data.chat_template import memory_limit

    is_file = path.endswith("tokenizer.json")
    if is_file:
        from tokenizers import Tokenizer
    else:
        from transformers import AutoTokenizer
    with limits:
        try:
            if is_file:
                loaded = Tokenizer.from_file(path)
            else:
                found = AutoTokenizer.from_pretrained(path, revision=revision, mistral_format=False)
                loaded = found.backend_tokenizer
            largest = max(loaded.get_vocab(with_added_tokens=True).values(), default=0)
            if largest >= MOST_TOKENS:
                return f"the id {largest:,}"
            raw = json.loads(loaded.to_str())  # which writes a token for each id between others
            with memory_limit(TEXT_BYTES):
                return _tokenised(loaded, raw)
        except MemoryError:
            raise
        except Exception:  # it cannot be loaded, or is a slow one: the parent finds that too
            return None
        except BaseException as error:  # what Rust calls a panic
            return f"{type(error).__name__}: {error}"[:300]


_KINDS: dict[str, Callable[..., str | None]] = {
    "template": _render,
    "tokenizer": _load,
}

_ASCII = "".join(map(chr, range(32, 127)))
_OTHERS = "\t\r\n\xa0éßΩжשع中あ한ไทहि😀ﷺﬁ①\u200d\u0301 ▁Ġ"
_LETTERS = [each * 40 + end for each in "aA0 .,-_\n" for end in ("", "!", "\0")]
_WORDS = "The quick brown fox jumps over 13 lazy dogs. " * 300


def _tokenised(tokenizer: Any, raw: Any) -> str | None:
    """Tokenise texts of many characters, with those that the tokenizer itself treats apart."""
    parts = ("normalizer", "pre_tokenizer", "post_processor", "decoder", "added_tokens")
    own = list(dict.fromkeys(_strings([raw.get(part) for part in parts])))
    for text in ("", _ASCII, _OTHERS, *_LETTERS, _WORDS, *own[:2000], _ASCII.join(own)[:20_000]):
        most = _GROWTH * len(text) + 10_000
        if tokenizer.normalizer is not None:
            length = len(tokenizer.normalizer.normalize_str(text))
            if length > most:
                return f"its normaliser makes {length:,} characters of {len(text):,}"
        ids = tokenizer.encode(text).ids
        if len(ids) > most:
            return f"{len(ids):,} tokens of {len(text):,} characters"
        length = len(tokenizer.decode(ids, skip_special_tokens=False))
        if length > most:
            return f"{length:,} characters, decoded from {len(ids):,} tokens"
    return None


def _strings(value: Any) -> Iterator[str]:
    """Texts in nested values, 1,000 characters of each."""
    if isinstance(value, str):
        yield value[:1000]
    elif isinstance(value, dict | list):
        for each in value.values() if isinstance(value, dict) else value:
            yield from _strings(each)
