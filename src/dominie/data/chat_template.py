"""Renders conversations with a tokenizer's chat template, and refuses templates that do not end.

A template is somebody's program. It runs in the sandbox of transformers, and a child process with
limits of its own makes each rendering first, so that no limit is ever set on this process. One that
tokenises for another is a child itself, and the system ends it.
"""

from __future__ import annotations

import ctypes
import os
import re
import threading
import time
from contextlib import contextmanager, nullcontext
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dominie.core.errors import InputError
from dominie.data.child_processes import processor_limit
from dominie.data.probes import with_arguments_in_both_forms
from dominie.data.trial_process import SLOW, trial

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from transformers import PreTrainedTokenizerBase

    from dominie.data.formats import Message
    from dominie.data.turn_bounds import Ending

SECONDS = 10.0
"""Of processor time for one rendering, which takes milliseconds."""
BYTES = 2**30
"""Of memory for one rendering, beyond what the process has."""
CHARACTERS = 2**26
"""Of one rendering."""

in_worker = False
"""Whether this process was started to tokenise: its memory is limited then while it renders."""
may_end = False
"""Whether the system ends this process if a rendering cannot be stopped in another way."""

Span = tuple[int, int]
"""Characters from the first up to, and without, the second."""

Chat = tuple["list[Message]", "list[dict[str, Any]] | None"]
"""Messages and tools."""
_QUESTION = {"role": "user", "content": "How many?"}
_ANSWER = {"role": "assistant", "content": "Four."}
_CALL = {"type": "function", "function": {"name": "count", "arguments": {"id": 7}}}
_TOOL = {"type": "function", "function": {"name": "count", "parameters": {"type": "object"}}}
_EXAMPLES: list[Chat] = [
    ([_QUESTION], None),
    ([{"role": "system", "content": "Be brief."}, *[_QUESTION, _ANSWER] * 2], None),
    ([_QUESTION, {**_ANSWER, "tool_calls": [_CALL]}, {"role": "tool", "content": "4"}], [_TOOL]),
]
_faults: dict[str, str | None] = {}  # template -> what is wrong with it, once it was tried


class BeyondLimits(Exception):
    """A rendering takes too much time or memory."""

    def __str__(self) -> str:
        return str(self.args[0]) if self.args else SLOW.format(SECONDS)


_lock = threading.Lock()
_running: dict[int, float] = {}  # thread -> its processor time when its rendering began
_watching = 0  # the process whose renderings a thread watches


@contextmanager
def time_limit() -> Iterator[None]:
    """Stop what this thread does in Python if it takes more than `SECONDS` of processor time.

    No signal and no limit of the process is used: other threads are left alone.

    Raises:
        BeyondLimits: it took more.
    """
    global _watching
    thread = threading.get_ident()
    with _lock:
        _running[thread] = _processor_time(thread)
        if _watching != os.getpid():
            _watching = os.getpid()
            threading.Thread(target=_watch, name="time-limit", daemon=True).start()
    try:
        with processor_limit(2 * SECONDS) if may_end else nullcontext():
            yield
    finally:
        with _lock:
            _running.pop(thread, None)


def _watch() -> None:
    """Stop renderings that take too long, for as long as there are any."""
    global _watching
    while True:
        time.sleep(SECONDS / 10)
        with _lock:
            if not _running:
                _watching = 0
                return
            for thread, begun in list(_running.items()):
                if _processor_time(thread) - begun > SECONDS:
                    del _running[thread]
                    ctypes.pythonapi.PyThreadState_SetAsyncExc(
                        ctypes.c_ulong(thread), ctypes.py_object(BeyondLimits)
                    )


def _processor_time(thread: int) -> float:
    if not hasattr(time, "pthread_getcpuclockid"):
        return time.monotonic()
    return time.clock_gettime(time.pthread_getcpuclockid(thread))


@contextmanager
def memory_limit(size: int) -> Iterator[None]:
    """Let this process, a child, have `size` bytes more and no more; on Linux."""
    try:
        import resource

        pages = int(Path("/proc/self/statm").read_bytes().split()[0])
        before = resource.getrlimit(resource.RLIMIT_AS)
        limit = pages * os.sysconf("SC_PAGE_SIZE") + size
        if before[0] != resource.RLIM_INFINITY:
            limit = min(limit, before[0])
        resource.setrlimit(resource.RLIMIT_AS, (limit, before[1]))
    except (ImportError, OSError, ValueError):  # another system
        yield
        return
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def _fault(source: str, variables: dict[str, Any], chats: Sequence[tuple[Any, ...]]) -> str | None:
    """What the child process finds wrong with renderings: they take too much time or memory.

    A template that raises an error is not at fault here: it may refuse one conversation and render
    others. None also if no child can be started.
    """
    return trial.render(source, SECONDS, BYTES, variables, chats, CHARACTERS)


class ChatTemplate:
    """The chat template of a tokenizer, run in the sandbox of transformers.

    Args:
        tokenizer: a fast tokenizer with a chat template.

    Raises:
        InputError: the tokenizer has no template, or does not give the positions of its tokens.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        name = getattr(tokenizer, "name_or_path", "") or type(tokenizer).__name__
        if not getattr(tokenizer, "is_fast", False):
            raise InputError(
                "the tokenizer does not give the positions of its tokens in a text",
                where=f"tokenizer {name}",
                expected="a fast tokenizer (tokenizer.json)",
                found=type(tokenizer).__name__,
                do="load it with AutoTokenizer, and have tokenizer.json beside the model",
            )
        if not tokenizer.chat_template:
            raise InputError(
                "the tokenizer has no chat template",
                where=f"tokenizer {name}",
                expected="a chat template in its folder (chat_template.jinja)",
                found="none, as with most models that were not tuned on chats",
                do="use the tokenizer of the teacher, or copy a chat template beside the model",
            )
        self.tokenizer, self.name = tokenizer, name
        self.rendered_whole: set[tuple[str, ...]] = set()
        """Roles of conversations, of those of which nothing was left out."""
        self.endings: dict[tuple[str, bool, str | None], list[Ending]] = {}
        """How turns ended that are alike: under this template, with calls, before this role."""

    def check(self, tools: list[dict[str, Any]] | None = None) -> None:
        """Let a child process render examples, once for each template.

        Raises:
            InputError: the template does not end, or takes too much memory.
        """
        if in_worker:  # this process is the child, and its parent has checked
            return
        try:
            source = self.source(tools)
        except ValueError:  # several templates, and none for this conversation
            return
        if source not in _faults:
            examples = [(*chat, prompt) for chat in _EXAMPLES for prompt in (False, True)]
            _faults[source] = _fault(source, self.tokenizer.special_tokens_map, examples)
        if found := _faults[source]:
            raise InputError(
                "the chat template fails, whatever the conversation",
                where=f"tokenizer {self.name}",
                expected=f"a text of at most {CHARACTERS:,} characters, written within "
                f"{SECONDS:g} s and {BYTES >> 20:,} MiB",
                found=found,
                do="correct the template, or use that of another tokenizer",
            )

    def try_rendering(
        self, messages: Any, tools: list[dict[str, Any]] | None, prompt: bool, source: str | None
    ) -> None:
        """Let a child process make a rendering that this one is about to make.

        Raises:
            BeyondLimits: it takes too much time or memory.
            ValueError: there are several templates, and none for this conversation.
        """
        if in_worker:
            return
        source = self.source(tools) if source is None else source
        variables = self.tokenizer.special_tokens_map
        if found := _fault(source, variables, [(messages, tools, prompt)]):
            raise BeyondLimits(found)

    @cached_property
    def added_tokens(self) -> tuple[str, ...]:
        """The tokens added to the vocabulary, the end of a turn among them, longest first."""
        return tuple(sorted(self.tokenizer.added_tokens_encoder, key=len, reverse=True))

    @cached_property
    def _added(self) -> frozenset[str]:
        return frozenset(self.added_tokens)

    def source(self, tools: list[dict[str, Any]] | None) -> str:
        """The template, that for tools where there are several."""
        return str(self.tokenizer.get_chat_template(tools=tools))

    def is_added(self, piece: str) -> bool:
        """Whether a piece is a token added to the vocabulary."""
        return piece in self._added

    def pieces(self, text: str) -> list[str]:
        """A text cut into added tokens and the lines between them."""
        if not self.added_tokens:
            return text.splitlines(keepends=True)
        parts = re.split("(" + "|".join(map(re.escape, self.added_tokens)) + ")", text)
        return [line for part in parts for line in part.splitlines(keepends=True)]

    def text(
        self,
        messages: list[Message],
        tools: list[dict[str, Any]] | None,
        *,
        where: str,
        generation_prompt: bool = False,
        source: str | None = None,
    ) -> str:
        """The rendering of `messages`, with the opening of the next assistant turn if asked for.

        Args:
            messages: the conversation.
            tools: JSON schemas of the tools on offer.
            where: where the conversation stands, for messages.
            generation_prompt: whether the assistant's answer follows.
            source: a template in the place of the tokenizer's.

        Raises:
            InputError: the template refuses the conversation, or fails on it.
        """
        if source is None:
            self.check(tools)
        failure: Exception | None = None
        for form in with_arguments_in_both_forms(messages):
            # A template is somebody's program: it may raise anything.
            try:
                self.try_rendering(form, tools, generation_prompt, source)
                with time_limit():
                    text = str(
                        self.tokenizer.apply_chat_template(
                            form,
                            tools=tools,
                            chat_template=source,
                            tokenize=False,
                            add_generation_prompt=generation_prompt,
                        )
                    )
                if len(text) > CHARACTERS:
                    raise ValueError(f"it writes {len(text):,} characters")
                return text
            except BeyondLimits as error:  # nor will it for another form of the arguments
                failure = error
                break
            except Exception as error:
                failure = failure or error
        raise InputError(
            "the chat template fails on this conversation",
            where=where or None,
            expected="a conversation as the template wants it",
            found=f"{type(failure).__name__}: {str(failure).strip()[:300]}",
            do="change the row (roles, their order, a system message), or the template",
        ) from failure
