"""Finds the assistant turns of a conversation in its rendered text.

Templates are programs, so their text cannot be searched for patterns. `{% generation %}` marks are
trusted where they cover every turn. Otherwise a turn is what the rendering up to it has beyond the
prompt before it. Where a template rewrites what came before (thinking removed, tools moved to the
last question), that difference does not hold, and a probe decides: a word added to a message, whose
rendering without the word is exactly the rendering of the conversation.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property
from itertools import count, takewhile
from typing import TYPE_CHECKING, Any

from dominie.core.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from dominie.data.chat_template import ChatTemplate, Span
    from dominie.data.conversations import Conversation
    from dominie.data.formats import Message


# Characters that Unicode keeps out of all text.
_BEGIN, _END = "\ufdd0", "\ufdd1"
_MARK = re.compile(r"(\{%[-+]?\s*generation\s*([-+]?)%\})(\n?)")
_END_MARK = re.compile(r"([ \t]*)(\{%([-+]?)\s*endgeneration\s*[-+]?%\})")


def assistant_turns(template: ChatTemplate, conversation: Conversation) -> tuple[str, list[Span]]:
    """The rendering of a conversation and the span of each assistant turn in it.

    A turn is what the assistant writes after the generation prompt, up to and with its end-of-turn
    token. White space that the template sets after that token belongs to no turn.

    Raises:
        InputError: the template fails on the conversation, or gives no way to find its turns.
    """
    messages, tools, where = conversation.messages, conversation.tools, conversation.where
    text, marks = text_and_marks(template, messages, tools, where=where)
    rendering = _Rendering(template, messages, tools, where, text)
    spans = rendering.marked_turns(marks) or [rendering.turn(k) for k in rendering.answers]
    spans = [rendering.without_trailing_space(span) for span in spans]
    ends = [0, *(end for _, end in spans)]
    if any(not end <= span[0] < span[1] for end, span in zip(ends, spans, strict=False)):
        raise rendering.no_turns("two turns overlap, or one is empty")
    if len(spans) == len(rendering.answers):
        for k, span in zip(rendering.answers, spans, strict=True):
            rendering.check_contained(k, text[slice(*span)])
    return text, spans


@dataclass(frozen=True)
class _Rendering:
    """A conversation and its rendering."""

    template: ChatTemplate
    messages: list[Message]
    tools: list[dict[str, Any]] | None
    where: str
    text: str

    @property
    def answers(self) -> list[int]:
        """The numbers of the assistant's messages."""
        return [k for k, message in enumerate(self.messages) if message["role"] == "assistant"]

    @cached_property
    def probe(self) -> str:
        """A word that is nowhere in the rendering."""
        # No end of this word is a beginning of it, so that no content can overlap with it.
        return next(word for n in count() if (word := f"qxprobe{n}z") not in self.text)

    def render(self, messages: list[Message], *, generation_prompt: bool = False) -> str:
        return self.template.text(
            messages, self.tools, where=self.where, generation_prompt=generation_prompt
        )

    def no_turns(self, found: str) -> InputError:
        return InputError(
            "the chat template does not show where the assistant's turns are",
            where=self.where or None,
            expected="a template that renders each turn in one piece, or marks it",
            found=found,
            do="set {% generation %} … {% endgeneration %} around the assistant's part of it",
        )

    def check_contained(self, k: int, turn: str) -> None:
        """Refuse a template that knows no tool calls, or takes a text for a list of images.

        Of a content the last word is looked for: templates remove thoughts before it, and some
        the text beside a tool call.
        """
        message = self.messages[k]
        calls = [call.get("function", call) for call in message.get("tool_calls", ())]
        last_word = re.split(r"[\s>]", message["content"].strip())[-1][-16:]
        expected = [str(call.get("name")) for call in calls] or [last_word]
        for part in expected:
            if part not in turn:
                raise InputError(
                    f"the chat template leaves out {'a tool call' if calls else 'an answer'}",
                    where=self.where or None,
                    expected=f"{part!r} in the turn of message {k + 1}",
                    found=repr(turn[:80]),
                    do="use a model or a template made for such conversations",
                )

    def is_closed(self, span: Span) -> bool:
        """Whether the span ends with a token of its own, white space after it aside."""
        return self.text[slice(*span)].rstrip().endswith(self.template.added_tokens)

    def without_trailing_space(self, span: Span) -> Span:
        """The span without the white space after its end-of-turn token.

        Without such a token the white space is how the turn ends, and stays.
        """
        if not self.is_closed(span):
            return span
        return span[0], span[0] + len(self.text[slice(*span)].rstrip())

    # Marked by the template

    def marked_turns(self, marks: list[Span]) -> list[Span]:
        """The marked spans with their end-of-turn tokens; nothing if they leave a turn out."""
        if len(marks) < len(self.answers):
            return []
        if all(map(self.is_closed, marks)):
            return marks
        spans = list(marks)
        for k in self.answers:
            alone, alone_marks = text_and_marks(
                self.template, self.messages[: k + 1], self.tools, where=self.where
            )
            last = len(alone_marks) - 1  # the last mark of this turn
            if not 0 <= last < len(spans):
                return []
            if not self.is_closed(spans[last]):
                spans[last] = self._closed(spans[last], alone[alone_marks[last][1] :])
        return spans

    def _closed(self, span: Span, closing: str) -> Span:
        """The span with the end-of-turn token that `closing` begins with and that follows it."""
        start, end = span
        for piece in self.template.pieces(closing):
            if not self.text.startswith(piece, end):
                break
            end += len(piece)
            if piece in self.template.added_tokens:
                return start, end
            if piece.strip():
                break
        return span

    # Found by rendering

    def turn(self, k: int) -> Span:
        """The span of message `k`."""
        if by_prefix := self._turn_by_prefix(k):
            return by_prefix
        start = self._start_by_probe(k)
        content_end, probed = self._content_end(k)
        return start, self._end_of_common(content_end, self._closing(k, probed))

    def _turn_by_prefix(self, k: int) -> Span | None:
        """What rendering one message more adds, where that leaves all before it as it was."""
        if k == 0:
            return None
        last = k + 1 == len(self.messages)
        try:
            before = self.render(self.messages[:k], generation_prompt=True)
            upto = self.text if last else self.render(self.messages[: k + 1])
        except InputError:  # a template may refuse what is cut off here, and accept the whole
            return None
        if not (upto.startswith(before) and self.text.startswith(upto)):
            return None
        return len(before), len(upto)

    def _closing(self, k: int, probed: Message) -> str:
        """What the template writes after message `k` before another answer, or at the end of all.

        The two differ where a template ends the last turn, or the document, with another token.
        """
        upto = [*self.messages[:k], probed]
        at_end = self._after_probe(self.render(upto))
        try:
            before_answer = self._after_probe(self.render(upto, generation_prompt=True))
            prompt = self._generation_prompt(self.messages[:k])
        except InputError:
            return at_end
        return before_answer.removesuffix(prompt) if prompt else at_end

    def _generation_prompt(self, messages: list[Message]) -> str:
        """What the template adds before an answer; empty if it adds nothing."""
        opened = self.template.pieces(self.render(messages, generation_prompt=True))
        ended = self.template.pieces(self.render(messages))
        pairs = zip(opened, ended, strict=False)
        same = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
        return "".join(opened[same:])

    def _start_by_probe(self, k: int) -> int:
        """Where the generation prompt before message `k` ends, as far as it is in the rendering."""
        if k:
            question_end, probed = self._content_end(k - 1)
            prompt = self.render([*self.messages[: k - 1], probed], generation_prompt=True)
            return self._end_of_common(question_end, self._after_probe(prompt))
        prompt = self._generation_prompt([{"role": "user", "content": self.probe}])
        if not prompt or prompt not in self.text:
            raise self.no_turns("a conversation that the assistant opens")
        return self.text.index(prompt) + len(prompt)

    def _content_end(self, k: int) -> tuple[int, Message]:
        """Where the content of message `k` ends in the rendering, and the probed message."""
        for probed in _with_last_word(self.messages[k], self.probe):
            try:
                text = self.render([*self.messages[:k], probed, *self.messages[k + 1 :]])
            except InputError:
                continue
            if self.probe in text and text.replace(self.probe, "") == self.text:
                earlier = (text.count(self.probe) - 1) * len(self.probe)
                return text.rindex(self.probe) - earlier, probed
        raise self.no_turns(
            f"message {k + 1} ({self.messages[k]['role']}) cannot be followed in it"
        )

    def _after_probe(self, text: str) -> str:
        return text.rpartition(self.probe)[2]

    def _end_of_common(self, start: int, expected: str) -> int:
        """How far the rendering goes on from `start` as `expected` does.

        Whole tokens and whole lines are compared: the openings of two tokens have much in common.
        """
        for piece in self.template.pieces(expected):
            if not self.text.startswith(piece, start):
                break
            start += len(piece)
        return start


def _with_last_word(message: Message, word: str) -> Iterator[Message]:
    """The message with `word` at the end of what templates render of it."""
    calls = message.get("tool_calls")
    if calls:
        yield {**message, "tool_calls": [*calls[:-1], _renamed(calls[-1], word)]}
        return
    yield {**message, "content": message["content"] + word}
    # Where the template strips contents, a word after white space would keep that in.
    yield {**message, "content": message["content"].rstrip() + word}


def _renamed(call: dict[str, Any], word: str) -> dict[str, Any]:
    if isinstance(call.get("function"), dict):
        return {**call, "function": _renamed(call["function"], word)}
    return {**call, "name": f"{call.get('name')}{word}"}


# Marks


def text_and_marks(
    template: ChatTemplate,
    messages: list[Message],
    tools: list[dict[str, Any]] | None,
    *,
    where: str,
) -> tuple[str, list[Span]]:
    """The rendering, and the spans in it that the template marks with `{% generation %}`.

    The marks are written into the text and taken out again, which is exact in macros and captured
    blocks too, where the positions that transformers counts are not.
    """
    text = template.text(messages, tools, where=where)
    source = template.tokenizer.get_chat_template(tools=tools)
    if not _MARK.search(source):
        return text, []
    marked = template.text(messages, tools, where=where, source=with_written_marks(source))
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
    plain, spans, begun = "", list[tuple[int, int]](), list[int]()
    for piece in pieces:
        if piece == _BEGIN:
            begun.append(len(plain))
        elif piece == _END and begun:
            spans.append((begun.pop(), len(plain)))
        else:
            plain += piece
    return plain, [span for span in spans if span[0] < span[1]]
