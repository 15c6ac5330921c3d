"""Finds the assistant turns of a conversation in its rendered text.

Templates are programs, so their text cannot be searched for patterns: their renderings are compared
(`turn_bounds.py`). `{% generation %}` marks leave out of the turns what is not to be learnt, and
tell of turns that comparisons do not find.
"""

from __future__ import annotations

import re
from contextlib import suppress
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from dominie.core.errors import InputError
from dominie.data.chat_template import ChatTemplate
from dominie.data.formats import Conversation
from dominie.data.turn_bounds import TurnBounds

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from dominie.data.chat_template import Span
    from dominie.data.formats import Message
    from dominie.data.turn_bounds import Turn


# Characters that Unicode keeps out of all text.
_BEGIN, _END = "\ufdd0", "\ufdd1"
_MARK = re.compile(r"(\{%[-+]?\s*generation\s*([-+]?)%\})(\n?)")
_END_MARK = re.compile(r"([ \t]*)(\{%([-+]?)\s*endgeneration\s*[-+]?%\})")


def assistant_turns(template: ChatTemplate, conversation: Conversation) -> tuple[str, list[Span]]:
    """The rendering of a conversation and the spans of it that are trained on, in order.

    They are what the assistant writes: from the end of the generation prompt up to and with the
    first end-of-turn token. Where the next header is all that ends a turn, its first token is that
    token; it is added to the rendering where the conversation ends with an answer.

    Raises:
        InputError: the template fails on the conversation, or gives no way to find its turns.
    """
    text, spans, _ = turns_and_end(template, conversation)
    return text, spans


def turns_and_end(
    template: ChatTemplate, conversation: Conversation
) -> tuple[str, list[Span], str]:
    """`assistant_turns`, and the token that ends the last turn; empty if none does."""
    messages, tools, where = conversation.messages, conversation.tools, conversation.where
    text, marks = text_and_marks(template, messages, tools, where=where)
    bounds = TurnBounds(template, messages, tools, where, text)
    try:
        turns = [bounds.turn(k) for k in bounds.answers]
        if any(b.span[0] < a.span[1] for a, b in pairwise(turns)):
            raise bounds.no_turns("two turns overlap")
    except InputError:
        if len(marks) != len(bounds.answers):
            _check_all_contained(bounds)
            raise
        spans = [_closed(template, text, mark) for mark in marks]
        for k, span in zip(bounds.answers, spans, strict=True):
            check_contained(bounds, k, text[slice(*span)])
        return text, spans, _last_token(template, text[slice(*spans[-1])])
    for k, turn in zip(bounds.answers, turns, strict=True):
        check_contained(bounds, k, text[slice(*turn.span)])
    spans = _marked(marks, turns) or [turn.span for turn in turns]
    if not turns:
        return text, spans, ""
    last = turns[-1].ending
    if last.appended:
        text += last.appended
        spans[-1] = spans[-1][0], len(text)
    return text, spans, last.token


def ends_of_turn(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens that end an assistant's turn under the chat template: an answer, then a call.

    They are those that a conversation of one answer, or of one call, is learnt to end with. A
    conversation that the template does not render tells nothing; none is an error.
    """
    template = ChatTemplate(tokenizer)
    ends: list[int] = []
    for chat in _ENDED:
        with suppress(InputError):
            token = turns_and_end(template, chat)[2]
            if token in tokenizer.added_tokens_encoder:
                ends.append(tokenizer.added_tokens_encoder[token])
    return list(dict.fromkeys(ends))


def unended(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """What the template writes after an answer, if no token ends one; None where one does.

    None too where the template renders none of the conversations that are tried.
    """
    template, after = ChatTemplate(tokenizer), None
    for chat in _ENDED:
        with suppress(InputError):
            text, spans, token = turns_and_end(template, chat)
            if token:
                return None
            after = text[slice(*spans[-1])].partition(chat.answer)[2] if chat.answer else after
    return after


_QUESTION = {"role": "user", "content": "How many?"}
_CALL = {
    "id": "call00007",
    "type": "function",
    "function": {"name": "count", "arguments": {"of": "a"}},
}
_COUNT = {"type": "object", "properties": {"of": {"type": "string", "description": "a thing"}}}
_TOOL = {"name": "count", "description": "Counts.", "parameters": _COUNT}
_TOOLS = [{"type": "function", "function": _TOOL}]
_ENDED = [
    Conversation([*before, _QUESTION, {"role": "assistant", "content": words, **calls}], tools)
    for words, calls, tools in (
        ("Four.", {}, None),
        ("Four.", {}, _TOOLS),
        ("", {"tool_calls": [_CALL]}, _TOOLS),
    )
    for before in ((), ({"role": "system", "content": "Be brief."},))
]


def _check_all_contained(bounds: TurnBounds) -> None:
    """`check_contained` for turns whose place is not known."""
    for k in bounds.answers:
        prompt, upto = bounds.prefix(k, prompt=True), bounds.prefix(k + 1)
        if prompt and upto and upto.startswith(prompt):
            check_contained(bounds, k, upto[len(prompt) :])


def check_contained(bounds: TurnBounds, k: int, turn: str) -> None:
    """Refuse a template that knows no tool calls, or takes a text for a list of images.

    Of a content the last word is looked for: templates remove thoughts before it, and some
    the text beside a tool call.
    """
    message = bounds.messages[k]
    calls = [call.get("function", call) for call in message.get("tool_calls", ())]
    last_word = re.split(r"[\s>]", message["content"].strip())[-1][-16:]
    expected = [str(call.get("name")) for call in calls] or [last_word]
    for part in expected:
        if part not in turn:
            raise InputError(
                f"the chat template leaves out {'a tool call' if calls else 'an answer'}",
                where=bounds.where or None,
                expected=f"{part!r} in the turn of message {k + 1}",
                found=repr(turn[:80]),
                do="use a model or a template made for such conversations",
            )


# Marks


def _marked(marks: list[Span], turns: list[Turn]) -> list[Span]:
    """What of the turns is marked, with their ends; nothing if a turn has no mark."""
    spans: list[Span] = []
    for turn in turns:
        start, end = turn.span
        inside = [(max(a, start), min(b, end)) for a, b in marks if a < end and b > start]
        if not inside:
            return []
        begin, stop = inside[-1]
        if turn.ending.token and stop >= turn.words_end:
            inside[-1] = begin, end
        spans += inside
    return spans


def _closed(template: ChatTemplate, text: str, mark: Span) -> Span:
    """A mark up to and with the token that follows it, without white space after a token."""
    start, end = mark
    inside = text[start:end].rstrip()
    if inside.endswith(template.added_tokens):
        return start, start + len(inside)
    following = template.pieces(text[end:])[:1]
    closed = following and template.is_added(following[0])
    return (start, end + len(following[0])) if closed else mark


def _last_token(template: ChatTemplate, text: str) -> str:
    return next((token for token in template.added_tokens if text.endswith(token)), "")


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
