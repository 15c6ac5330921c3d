"""Renders conversations with a tokenizer's chat template, and refuses templates that do not end.

A template is somebody's program. It runs in the sandbox of transformers, and before its first use a
child process with limits of its own tries it, so that no limit is ever set on this process.
"""

from __future__ import annotations

import ctypes
import json
import os
import re
import threading
import time
from contextlib import contextmanager, suppress
from functools import cached_property
from typing import TYPE_CHECKING, Any

from dominie.core.errors import InputError
from dominie.data.child_processes import template_fault

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from transformers import PreTrainedTokenizerBase

    from dominie.data.formats import Message

SECONDS = 10.0
"""Of processor time for one rendering, which takes milliseconds."""
BYTES = 2**30
"""Of memory for one rendering, beyond what the process has."""
CHARACTERS = 2**26
"""Of one rendering."""
PROBED = 32
"""So many of the first conversations are rendered by the child process too."""

in_worker = False
"""Whether this process was started to tokenise: its memory is limited then while it renders."""

Span = tuple[int, int]
"""Characters from the first up to, and without, the second."""

# Characters that Unicode keeps out of all text.
_BEGIN, _END = "\ufdd0", "\ufdd1"
_MARK = re.compile(r"(\{%[-+]?\s*generation\s*([-+]?)%\})(\n?)")
_END_MARK = re.compile(r"([ \t]*)(\{%([-+]?)\s*endgeneration\s*[-+]?%\})")


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


class RenderingTimeout(Exception):
    """A template did not come to its end."""

    def __str__(self) -> str:
        return f"it did not end within {SECONDS:g} s"


_lock = threading.Lock()
_running: dict[int, float] = {}  # thread -> its processor time when its rendering began
_watching = 0  # the process whose renderings a thread watches


@contextmanager
def time_limit() -> Iterator[None]:
    """Stop what this thread does in Python if it takes more than `SECONDS` of processor time.

    No signal and no limit of the process is used: other threads are left alone.

    Raises:
        RenderingTimeout: it took more.
    """
    global _watching
    thread = threading.get_ident()
    with _lock:
        _running[thread] = _processor_time(thread)
        if _watching != os.getpid():
            _watching = os.getpid()
            threading.Thread(target=_watch, name="time-limit", daemon=True).start()
    try:
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
                        ctypes.c_ulong(thread), ctypes.py_object(RenderingTimeout)
                    )


def _processor_time(thread: int) -> float:
    if not hasattr(time, "pthread_getcpuclockid"):
        return time.monotonic()
    return time.clock_gettime(time.pthread_getcpuclockid(thread))


class ChatTemplate:
    """The chat template of a tokenizer, run in the sandbox of transformers.

    Args:
        tokenizer: a fast tokenizer with a chat template.

    Raises:
        InputError: the tokenizer has no template, or cannot tell where its tokens stand in a text.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        name = getattr(tokenizer, "name_or_path", "") or type(tokenizer).__name__
        if not getattr(tokenizer, "is_fast", False):
            raise InputError(
                "the tokenizer cannot tell where its tokens stand in a text",
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

    def check(self, chats: Sequence[Chat]) -> None:
        """Let a child process render examples and the first of `chats`, once for each template.

        Raises:
            InputError: the template does not end, or takes too much memory.
        """
        if in_worker:  # this process is the child, and its parent has checked
            return
        for _, tools in chats[:PROBED]:
            try:
                source = self.tokenizer.get_chat_template(tools=tools)
            except ValueError:  # several templates, and none for this conversation
                continue
            if source not in _faults:
                _faults[source] = template_fault(
                    source,
                    self.tokenizer.special_tokens_map,
                    [*_EXAMPLES, *chats[:PROBED]],
                    seconds=SECONDS,
                    memory=BYTES,
                    characters=CHARACTERS,
                )
            if found := _faults[source]:
                raise InputError(
                    "the chat template fails, whatever the conversation",
                    where=f"tokenizer {self.name}",
                    expected=f"a text of at most {CHARACTERS:,} characters, written within "
                    f"{SECONDS:g} s and {BYTES >> 20:,} MiB",
                    found=found,
                    do="correct the template, or use that of another tokenizer",
                )

    @cached_property
    def added_tokens(self) -> tuple[str, ...]:
        """The tokens added to the vocabulary, the end of a turn among them, longest first."""
        return tuple(sorted(self.tokenizer.added_tokens_encoder, key=len, reverse=True))

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
            generation_prompt: whether the assistant is to speak next.
            source: a template in the place of the tokenizer's.

        Raises:
            InputError: the template refuses the conversation, or fails on it.
        """
        if source is None:
            self.check([(messages, tools)])
        failure: Exception | None = None
        for form in with_arguments_in_both_forms(messages):
            # A template is somebody's program: it may raise anything.
            try:
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
            except RenderingTimeout as error:  # nor will it for another form of the arguments
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

    def text_and_marks(
        self, messages: list[Message], tools: list[dict[str, Any]] | None, *, where: str
    ) -> tuple[str, list[Span]]:
        """The rendering, and the spans in it that the template marks with `{% generation %}`.

        The marks are written into the text and taken out again, which is exact in macros and
        captured blocks too, where the positions that transformers counts are not.
        """
        text = self.text(messages, tools, where=where)
        source = self.tokenizer.get_chat_template(tools=tools)
        if not _MARK.search(source):
            return text, []
        marked = self.text(messages, tools, where=where, source=with_written_marks(source))
        unmarked, spans = _without_written_marks(marked)
        return text, spans if unmarked == text else []


def with_written_marks(source: str) -> str:
    """A template that writes a character where a `{% generation %}` begins, another where it ends.

    Nothing else changes in what it renders: the white space that these tags remove, by their own
    signs or by the settings of chat templates (`trim_blocks`, `lstrip_blocks`), is removed still.
    """

    def begin(match: re.Match[str]) -> str:
        tag, sign, line_end = match.groups()
        if sign:
            return f'{tag}{{{{ "{_BEGIN}" {sign if sign == "-" else ""}}}}}{line_end}'
        return f'{tag}{line_end}{{{{ "{_BEGIN}" }}}}'

    def end(match: re.Match[str]) -> str:
        indent, tag, sign = match.groups()
        opens_line = not sign and match.string[: match.start()].endswith("\n")
        minus = "-" if sign == "-" else ""
        return f'{"" if opens_line else indent}{{{{{minus} "{_END}" }}}}{tag}'

    return _END_MARK.sub(end, _MARK.sub(begin, source))


def _without_written_marks(text: str) -> tuple[str, list[Span]]:
    """The text without the characters of marks, and the spans that they enclosed."""
    pieces = re.split(f"([{_BEGIN}{_END}])", text)
    plain, spans, begun = "", list[Span](), list[int]()
    for piece in pieces:
        if piece == _BEGIN:
            begun.append(len(plain))
        elif piece == _END and begun:
            spans.append((begun.pop(), len(plain)))
        else:
            plain += piece
    return plain, [span for span in spans if span[0] < span[1]]


def with_arguments_in_both_forms(messages: list[Message]) -> Iterator[list[Message]]:
    """Messages whose tool calls carry their arguments as objects, then as JSON text.

    Data has either form. Most templates want objects and would quote a text a second time; the
    others fail on an object, which they would add to a text.
    """
    if not any("tool_calls" in message for message in messages):
        yield messages
        return
    for form in (_parsed, _unparsed):
        yield [
            {
                **message,
                "tool_calls": [_with_arguments(call, form) for call in message["tool_calls"]],
            }
            if "tool_calls" in message
            else message
            for message in messages
        ]


def _with_arguments(call: dict[str, Any], form: Callable[[Any], Any]) -> dict[str, Any]:
    if isinstance(call.get("function"), dict):
        return {**call, "function": _with_arguments(call["function"], form)}
    return {**call, "arguments": form(call["arguments"])} if "arguments" in call else call


def _parsed(arguments: Any) -> Any:
    if isinstance(arguments, str):
        with suppress(ValueError, RecursionError):
            value = json.loads(arguments)
            return value if isinstance(value, dict) else arguments
    return arguments


def _unparsed(arguments: Any) -> Any:
    return arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
