"""Finds what a chat template leaves out of a conversation: each part is marked and looked for.

A template renders what its author thought of: many know no thoughts, no tools, no second call of a
turn, or no system message after the first. Texts are not compared, since templates strip, quote and
move them: a word is added to each part, and a part whose word is not in the rendering is left out.
"""

from __future__ import annotations

import copy
import json
import re
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import count
from typing import TYPE_CHECKING, Any

from dominie.core.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from dominie.data.chat_template import ChatTemplate
    from dominie.data.formats import Conversation, Message

THOUGHTS = ("reasoning_content", "reasoning", "thinking", "thoughts")
"""Keys of a message under which templates and data keep what an assistant thinks."""
_EARLIER = "thoughts of earlier turns, which it keeps in the last turn alone"
_END_OF_THOUGHTS = "</think>"
_WORD = re.compile("[A-Za-z0-9]+")
_TOOLS = "the tools on offer"
_TEXT = {"type": "string", "description": "a text"}

Path = tuple[str | int, ...]
"""Keys and positions from the conversation down to a text in it."""


@dataclass(frozen=True)
class LeftOut:
    """A kind of part that the chat template leaves out.

    Attributes:
        what: the kind, in words.
        conversations: how many of them have such a part that is left out.
        first: the row and the message where this was found first.
    """

    what: str
    conversations: int
    first: str

    def line(self, source: str, kept: int) -> str:
        """A warning for the source `source`, of which `kept` conversations are used."""
        rows = f"{self.conversations:,} of {kept:,} conversations (the first: {self.first})"
        if self.what.startswith("the key"):  # a date or a name, mostly
            return f"{source}: the chat template does not read {self.what}, in {rows}"
        advice = "use a model or a template made for such conversations, or change the rows"
        if self.what == _EARLIER:
            advice = "to train on each of them, give each turn a row that ends with it"
        lost = f"warning: {source}: the chat template leaves out {self.what}, in {rows}"
        return f"{lost}, and they are trained on without; {advice}"


def is_rich(conversation: Conversation) -> bool:
    """Whether a conversation has tools, thoughts or other keys that templates treat apart."""
    return bool(conversation.tools) or any(
        len(message) > 2 or _END_OF_THOUGHTS in message["content"]
        for message in conversation.messages
    )


def summed(found: Iterable[LeftOut], before: Sequence[LeftOut] = ()) -> list[LeftOut]:
    """What was found, added to what was found `before`, kind by kind."""
    kinds = {each.what: each for each in before}
    for each in found:
        known = kinds.setdefault(each.what, replace(each, conversations=0))
        number = known.conversations + each.conversations
        kinds[each.what] = replace(known, conversations=number)
    return list(kinds.values())


@dataclass(frozen=True)
class _Part:
    """A part of a conversation.

    Attributes:
        what: the kind, in words.
        message: its number from 1; 0 for a tool on offer.
        text: what it says; empty if that is no text.
        paths: where that is; of several texts that say the same, a template renders one.
        refused: whether nobody can want to train without it.
        mark: text and word -> the text with the word in it.
    """

    what: str
    message: int
    text: str
    paths: tuple[Path, ...]
    refused: bool = False
    mark: Callable[[Any, str], Any] = lambda text, word: f"{text}{word}"

    @property
    def tool(self) -> str | int | None:
        """Which tool on offer it belongs to, if to one."""
        kind, number, *_ = self.paths[0]
        return number if kind == "tools" else None

    @property
    def place(self) -> str:
        """Which message it is in, and which call of it."""
        message = f"message {self.message}"
        calls = [int(path[3]) + 1 for path in self.paths if path[2:3] == ("tool_calls",)]
        return f"call {calls[0]} of {message}" if calls else message

    def marked(self, chat: dict[str, Any], word: str) -> None:
        """Write the word into the part in `chat`, a copy."""
        for *above, last in self.paths:
            place: Any = chat
            for key in above:
                place = place[key]
            place[last] = self.mark(place[last], word)


def left_out(template: ChatTemplate, conversation: Conversation, text: str) -> list[LeftOut]:
    """What the chat template leaves out of a conversation, one entry for each kind.

    Args:
        template: rendered the conversation.
        conversation: with its tools.
        text: the rendering.

    Raises:
        InputError: a question, a tool call or its arguments are left out.
    """
    if _is_known_whole(template, conversation, text):
        return []
    search = _Search(template, conversation, text)
    missing = search.missing(list(_parts(conversation)))
    whole_tools = {part.tool for part in missing if part.what == _TOOLS}
    found: dict[str, LeftOut] = {}
    for part in missing:
        if part.tool in whole_tools and part.what != _TOOLS:
            continue
        if part.refused:
            raise InputError(
                f"the chat template leaves out {part.what}",
                where=conversation.where or None,
                expected=f"{part.place}, in the text that is trained on",
                found=f"no trace of {part.text!r:.80}",
                do="use a model or a template made for such conversations",
            )
        what = _EARLIER if search.keeps_at_the_end(part) else part.what
        place = f", {part.place}" if part.message else ""
        row = conversation.where.replace("\\", "/").rpartition("/")[2] or "the conversation"
        found.setdefault(what, LeftOut(what, 1, row + place))
    if not missing:
        template.rendered_whole.add(_shape(conversation))
    return list(found.values())


def _is_known_whole(template: ChatTemplate, conversation: Conversation, text: str) -> bool:
    """Whether one of this shape was rendered whole, and the contents of this one are there."""
    # Templates look at roles and keys, hardly at words: most conversations are rendered once less.
    return _shape(conversation) in template.rendered_whole and all(
        len(message) == 2
        and _END_OF_THOUGHTS not in message["content"]
        and message["content"].strip() in text
        for message in conversation.messages
    )


def _shape(conversation: Conversation) -> tuple[str, ...]:
    """The roles in order, of a conversation without tools; only such are asked for."""
    return ("tools",) if conversation.tools else tuple(m["role"] for m in conversation.messages)


@dataclass(frozen=True)
class _Search:
    """Renders a conversation with words in its parts, and looks for them."""

    template: ChatTemplate
    conversation: Conversation
    text: str

    def missing(self, parts: Sequence[_Part]) -> list[_Part]:
        """Those of the parts that the rendering leaves out."""
        absent = self._absent(parts)
        if absent == [] and all(map(self._says, parts)):
            return []
        # A word in one part may change what is made of another, or fail.
        return [part for part in parts if self._lacks(part, absent)]

    def _lacks(self, part: _Part, absent: list[_Part] | None) -> bool:
        if not self._says(part):
            return True
        return (absent is None or part in absent) and bool(self._absent([part]))

    def _says(self, part: _Part) -> bool:
        """Whether the longest word of the part is rendered: escapes and quotes aside, it is whole.

        A template may leave out what it knows, its own system message, and not what a word follows.
        """
        longest = max(_WORD.findall(part.text), key=len, default="")
        return longest.casefold() in self._folded

    @cached_property
    def _folded(self) -> str:
        return self.text.casefold()

    def keeps_at_the_end(self, part: _Part) -> bool:
        """Whether thoughts would be rendered if the conversation ended with their message."""
        if not part.what.startswith("thoughts") or part.message == len(self.conversation.messages):
            return False
        return self._absent([part], self.conversation.messages[: part.message]) == []

    def _absent(
        self, parts: Sequence[_Part], messages: list[Message] | None = None
    ) -> list[_Part] | None:
        """Those of the parts whose words are not rendered; None if the template fails on them."""
        chat: dict[str, Any] = {
            "messages": copy.deepcopy(messages or self.conversation.messages),
            "tools": copy.deepcopy(self.conversation.tools),
        }
        base = next(word for n in count() if (word := f"qxpart{n}x") not in self.text)
        words = [f"{base}{number}z" for number in range(len(parts))]
        for part, word in zip(parts, words, strict=True):
            part.marked(chat, word)
        try:
            text = self.template.text(chat["messages"], chat["tools"], where="")
        except InputError:
            return None
        return [part for part, word in zip(parts, words, strict=True) if word not in text]


def _parts(conversation: Conversation) -> Iterator[_Part]:
    """Everything in a conversation that has words in it."""
    for n, tool in enumerate(conversation.tools or ()):
        yield from _parts_of_tool(tool, ("tools", n))
    for n, message in enumerate(conversation.messages):
        yield from _parts_of_message(message, n)


def _parts_of_tool(tool: dict[str, Any], path: Path) -> Iterator[_Part]:
    if isinstance(tool.get("function"), dict):
        tool, path = tool["function"], (*path, "function")
    if name := _text(tool, "name"):
        yield _Part(_TOOLS, 0, name, ((*path, "name"),))
    if description := _text(tool, "description"):
        yield _Part("descriptions of tools", 0, description, ((*path, "description"),))
    parameters = tool.get("parameters")
    properties = parameters.get("properties") if isinstance(parameters, dict) else None
    if isinstance(properties, dict) and properties:
        path = (*path, "parameters", "properties")
        names = " ".join(map(str, properties))
        yield _Part("parameters of tools", 0, names, (path,), mark=_with_key)
        for name, value in properties.items():
            if description := _text(value, "description"):
                where = (*path, name, "description")
                yield _Part("descriptions of parameters of tools", 0, description, (where,))


def _parts_of_message(message: Message, n: int) -> Iterator[_Part]:
    path, role = ("messages", n), message["role"]
    calls = message.get("tool_calls", ())
    before, mark, spoken = "", "", message["content"]
    if role == "assistant":
        before, mark, spoken = spoken.rpartition(_END_OF_THOUGHTS)
    if spoken.strip():
        what = {
            "system": "system messages",
            "user": "a question",
            "tool": "results of tools",
            "assistant": "words beside a tool call" if calls else "an answer",
        }[role]
        refused = role == "user" or (role == "assistant" and not calls)
        yield _Part(what, n + 1, spoken, ((*path, "content"),), refused)
    if role != "assistant":
        return
    thoughts = {key: text for key in THOUGHTS if (text := _text(message, key))}
    for text in dict.fromkeys(thoughts.values()):
        keys = tuple((*path, key) for key, same in thoughts.items() if same == text)
        yield _Part("thoughts", n + 1, text, keys)
    if mark and (text := before.rpartition("<think>")[2]).strip():
        yield _Part("thoughts", n + 1, text, ((*path, "content"),), mark=_in_thoughts)
    for k, call in enumerate(calls):
        place: Path = (*path, "tool_calls", k)
        if isinstance(call.get("function"), dict):
            call, place = call["function"], (*place, "function")
        if name := _text(call, "name"):
            yield _Part("a tool call", n + 1, name, ((*place, "name"),), refused=True)
        if (given := call.get("arguments")) not in (None, "", {}, "{}"):
            text = given if isinstance(given, str) else json.dumps(given, ensure_ascii=False)
            yield _Part(
                "arguments of a tool call",
                n + 1,
                text,
                ((*place, "arguments"),),
                refused=True,
                mark=_with_argument,
            )


def _text(value: Any, key: str) -> str:
    """The text under a key; empty if there is none."""
    text = value.get(key) if isinstance(value, dict) else None
    return text if isinstance(text, str) and text.strip() else ""


def _in_thoughts(content: str, word: str) -> str:
    thoughts, end, rest = content.rpartition(_END_OF_THOUGHTS)
    return f"{thoughts.rstrip()}{word}\n{end}{rest}"


def _with_key(properties: dict[str, Any], word: str) -> dict[str, Any]:
    return properties | {word: _TEXT}


def _with_argument(arguments: Any, word: str) -> Any:
    """Arguments with one more, in the form in which they were given."""
    value = arguments
    if isinstance(arguments, str):
        with suppress(ValueError, RecursionError):
            value = json.loads(arguments)
    if isinstance(value, dict):
        value = {**value, word: word}
        return json.dumps(value) if isinstance(arguments, str) else value
    return [*value, word] if isinstance(arguments, list) else f"{arguments}{word}"
