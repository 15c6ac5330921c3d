"""Renders a conversation with a word more at a known place: where that stands, the place is.

The rendering with the word must be that of the conversation but for the word, which is in none.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import cached_property
from itertools import count, islice, takewhile
from typing import TYPE_CHECKING, Any

from dominie.core.errors import InputError
from dominie.data.left_out import THOUGHTS

if TYPE_CHECKING:
    from dominie.data.chat_template import ChatTemplate

Message = dict[str, Any]
Change = Callable[[Message, str], Iterator[Message]]
"""A message and a word -> the message with the word in it, the likelier place first."""

_TAG = re.compile(r"<[^<>\s]+>")
_TRIED = 8  # places in the arguments of a call


def with_arguments_in_both_forms(messages: list[Message]) -> Iterator[list[Message]]:
    """Messages whose tool calls carry their arguments as objects, then as JSON text.

    Data has either form. Most templates want objects and would quote a text a second time; the
    others fail on an object, which they would add to a text.
    """
    if not any("tool_calls" in message for message in messages):
        yield messages
        return
    for form in (parsed_arguments, _unparsed):
        yield [
            {**m, "tool_calls": [_with_arguments(call, form) for call in m["tool_calls"]]}
            if "tool_calls" in m
            else m
            for m in messages
        ]


def _with_arguments(call: dict[str, Any], form: Callable[[Any], Any]) -> dict[str, Any]:
    if isinstance(call.get("function"), dict):
        return {**call, "function": _with_arguments(call["function"], form)}
    return {**call, "arguments": form(call["arguments"])} if "arguments" in call else call


def parsed_arguments(arguments: Any) -> Any:
    """The arguments of a call as an object, where they are JSON text of one."""
    if isinstance(arguments, str):
        with suppress(ValueError, RecursionError):
            value = json.loads(arguments)
            return value if isinstance(value, dict) else arguments
    return arguments


def _unparsed(arguments: Any) -> Any:
    return arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)


# A word more


def _after_content(message: Message, word: str) -> Iterator[Message]:
    if message["content"].strip() or "tool_calls" not in message:
        yield {**message, "content": message["content"] + word}
        # Where the template strips contents, a word after white space would keep that in.
        yield {**message, "content": message["content"].rstrip() + word}


def _before_content(message: Message, word: str) -> Iterator[Message]:
    if message["content"].strip():
        yield {**message, "content": word + message["content"]}
        yield {**message, "content": word + message["content"].lstrip()}


def _after_thoughts(message: Message, word: str) -> Iterator[Message]:
    for key in THOUGHTS:
        if isinstance(message.get(key), str) and message[key].strip():
            yield {**message, key: message[key] + word}
            yield {**message, key: message[key].rstrip() + word}


def _before_thoughts(message: Message, word: str) -> Iterator[Message]:
    for key in THOUGHTS:
        if isinstance(message.get(key), str) and message[key].strip():
            yield {**message, key: word + message[key].lstrip()}


def _after_calls(message: Message, word: str) -> Iterator[Message]:
    calls = message.get("tool_calls") or []
    for n in reversed(range(len(calls))):  # some templates render the first one alone
        for call in after_call(calls[n], word):
            yield {**message, "tool_calls": [*calls[:n], call, *calls[n + 1 :]]}


def _before_calls(message: Message, word: str) -> Iterator[Message]:
    if calls := message.get("tool_calls"):
        function = calls[0].get("function", calls[0])
        named = {**function, "name": f"{word}{function.get('name')}"}
        call = {**calls[0], "function": named} if "function" in calls[0] else named
        yield {**message, "tool_calls": [call, *calls[1:]]}


def after_call(call: dict[str, Any], word: str) -> Iterator[dict[str, Any]]:
    """The call with the word in its arguments, the last first, or behind its name."""
    if isinstance(function := call.get("function"), dict):
        for changed in after_call(function, word):
            yield {**call, "function": changed}
        return
    for arguments in islice(_with_word(parsed_arguments(call.get("arguments")), word), _TRIED):
        yield {**call, "arguments": arguments}
    yield {**call, "name": f"{call.get('name')}{word}"}


def _with_word(value: Any, word: str) -> Iterator[Any]:
    """The value with the word behind a text or a key in it, the last first."""
    if isinstance(value, str):
        yield value + word
    elif isinstance(value, dict):
        for key in reversed(value):
            yield from ({**value, key: changed} for changed in _with_word(value[key], word))
            yield {(name + word if name == key else name): item for name, item in value.items()}
    elif isinstance(value, list):
        for n in reversed(range(len(value))):
            yield from ([*value[:n], new, *value[n + 1 :]] for new in _with_word(value[n], word))


AFTER: tuple[Change, ...] = _after_content, _after_calls, _after_thoughts
BEFORE: tuple[Change, ...] = _before_content, _before_calls, _before_thoughts
"""Of what templates render of an assistant: content, calls, thoughts."""


class Rendering:
    """A conversation and its rendering.

    Args:
        template: that rendered it.
        messages: of the conversation.
        tools: on offer in it.
        where: it stands, for messages.
        text: the rendering.
    """

    def __init__(
        self,
        template: ChatTemplate,
        messages: list[Message],
        tools: list[dict[str, Any]] | None,
        where: str,
        text: str,
    ) -> None:
        self.template, self.tools, self.where = template, tools, where
        self.messages, self.text = messages, text
        self._prefixes: dict[tuple[int, bool], str | None] = {}

    @property
    def answers(self) -> list[int]:
        """The numbers of the assistant's messages."""
        return [k for k, message in enumerate(self.messages) if message["role"] == "assistant"]

    @cached_property
    def probe(self) -> str:
        """A word that is nowhere in the rendering."""
        # No end of this word is a beginning of it, so that no content can overlap with it.
        return next(word for n in count() if (word := f"qxprobe{n}z") not in self.text)

    def no_turns(self, found: str) -> InputError:
        """The error for a template that does not tell what was asked."""
        return InputError(
            "the chat template does not show where the assistant's turns are",
            where=self.where or None,
            expected="a template that renders each turn in one piece, or marks it",
            found=found,
            do="set {% generation %} … {% endgeneration %} around the assistant's part of it",
        )

    # Renderings

    def render(self, messages: list[Message], *, prompt: bool = False) -> str | None:
        """The rendering of other messages; None where the template refuses them."""
        try:
            return self.template.text(
                messages, self.tools, where=self.where, generation_prompt=prompt
            )
        except InputError:
            return None

    def prefix(self, size: int, *, prompt: bool = False) -> str | None:
        """The rendering of the first `size` messages; None where the template refuses them."""
        if size == len(self.messages) and not prompt:
            return self.text
        if (size, prompt) not in self._prefixes:
            text = self.render(self.messages[:size], prompt=prompt) if size else None
            self._prefixes[size, prompt] = text
        return self._prefixes[size, prompt]

    # Words

    def last_word(self, messages: list[Message], text: str, k: int) -> int | None:
        """Where in `text`, the rendering of `messages`, the last word of message `k` ends."""
        found = [self._probed(messages, text, k, part) for part in AFTER]
        return max((at for at in found if at is not None), default=None)

    def first_word(self, k: int) -> int | None:
        """Where the first word of message `k` begins."""
        found = [self._probed(self.messages, self.text, k, part) for part in BEFORE]
        return min((at for at in found if at is not None), default=None)

    def _probed(
        self,
        messages: list[Message],
        text: str,
        k: int,
        changes: Change,
    ) -> int | None:
        """Where the word stands first that one of the changes adds to message `k`."""
        for changed in changes(messages[k], self.probe):
            probed = self.render([*messages[:k], changed, *messages[k + 1 :]])
            if probed and self.probe in probed and probed.replace(self.probe, "") == text:
                return probed.index(self.probe)
        return None

    # Pieces

    def tokens(self, pieces: list[str]) -> list[str]:
        """The pieces that are tokens added to the vocabulary."""
        return [piece for piece in pieces if self.template.is_added(piece)]

    def finely(self, text: str) -> list[str]:
        """Pieces in which a tag counts as a token, whether or not it is one."""
        pieces: list[str] = []
        for piece in self.template.pieces(text):
            if self.template.is_added(piece):
                pieces.append(piece)
            else:
                pieces += [part for part in re.split(f"({_TAG.pattern})", piece) if part]
        return pieces

    def is_mark(self, piece: str) -> bool:
        """Whether a piece is a token, a tag or white space."""
        return self.template.is_added(piece) or bool(_TAG.fullmatch(piece)) or not piece.strip()

    def first_token(self, text: str) -> tuple[str, str]:
        """The token that a text begins with, and the white space before it."""
        blank = ""
        for piece in self.template.pieces(text):
            if self.template.is_added(piece):
                return piece, blank
            if piece.strip():
                break
            blank += piece
        return "", ""

    def through_token(self, pieces: list[str], number: int) -> str:
        """The text up to and with the added token of this number, from 0."""
        places = [n for n, piece in enumerate(pieces) if self.template.is_added(piece)]
        return "".join(pieces[: places[number] + 1])


def common_pieces(pieces: list[str], others: list[str]) -> list[str]:
    """The pieces with which both lists begin.

    Whole tokens and whole lines are compared: the openings of two tokens have much in common.
    """
    pairs = takewhile(lambda pair: pair[0] == pair[1], zip(pieces, others, strict=False))
    return [piece for piece, _ in pairs]
