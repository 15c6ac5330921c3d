"""Finds where a turn of the assistant begins and ends in a rendered conversation.

The assistant writes what lies between the generation prompt and the end-of-turn token. Both are
learnt from renderings of the conversation itself: the first is what the template adds for an
answer, the second is what follows the last word of the turn wherever the conversation goes on.
Words are found by a probe: a word added to a message, whose rendering without the word is exactly
the rendering of the conversation.
"""

from __future__ import annotations

import re
from functools import cached_property
from itertools import takewhile
from typing import TYPE_CHECKING, NamedTuple

from dominie.data.probes import Rendering, after_call, common_pieces

if TYPE_CHECKING:
    from collections.abc import Iterator

    from dominie.data.chat_template import Span
    from dominie.data.formats import Message

_ENDINGS_KEPT = 8


class Ending(NamedTuple):
    """How the template ends a turn of some shape.

    Attributes:
        rest: all that it writes after the last word if the conversation ends there.
        closing: the part of the turn that follows its last word.
        appended: the end-of-turn token, where the rendering ends before it.
        token: the end-of-turn token; empty if the template has none there.
    """

    rest: str | None
    closing: str
    appended: str
    token: str


class Turn(NamedTuple):
    """Where a turn lies in the rendering, and how it ends.

    Attributes:
        span: its characters.
        words_end: where the last word of it ends.
        ending: how it ends.
    """

    span: Span
    words_end: int
    ending: Ending


class TurnBounds(Rendering):
    """A rendered conversation, and where its turns are."""

    def turn(self, k: int) -> Turn:
        """The turn of message `k`.

        Raises:
            InputError: the template does not tell where it begins or ends.
        """
        start, alone = self._start_by_prefix(k), self.prefix(k + 1)
        if start is not None and alone is not None:
            for ending in self._known_endings(k):
                if turn := self._as_before(k, start, alone, ending):
                    return turn
        words_end = self.last_word(self.messages, self.text, k)
        if words_end is None:
            role = self.messages[k]["role"]
            raise self.no_turns(f"message {k + 1} ({role}) cannot be followed in it")
        start = self._start(k, words_end) if start is None else start
        ending = self._ending(k, words_end)
        span = start, words_end + len(ending.closing)
        if span[0] >= span[1] or self._ends_before(k, span, ending):
            raise self.no_turns(f"message {k + 1} is not one turn")
        known = self._known_endings(k)
        known.insert(0, ending)
        del known[_ENDINGS_KEPT:]
        return Turn(span, words_end, ending)

    # What was learnt from turns of the same shape

    def _known_endings(self, k: int) -> list[Ending]:
        follows = self.messages[k + 1]["role"] if k + 1 < len(self.messages) else None
        shape = (self.template.source(self.tools), "tool_calls" in self.messages[k], follows)
        return self.template.endings.setdefault(shape, [])

    def _as_before(self, k: int, start: int, alone: str, ending: Ending) -> Turn | None:
        """The turn, if it ends as another one did; `alone` is the rendering up to it."""
        if ending.rest is None or not alone.endswith(ending.rest):
            return None
        words_end = len(alone) - len(ending.rest)
        if words_end <= start or not self.text.startswith(alone[:words_end]):
            return None
        if not self.text.startswith(ending.closing, words_end):
            return None
        span = start, words_end + len(ending.closing)
        if self._ends_before(k, span, ending):
            return None
        return Turn(span, words_end, ending)

    # Where it begins

    def _start_by_prefix(self, k: int) -> int | None:
        """Where the prompt before message `k` ends, if the rendering up to it begins the whole."""
        prompt = self.prefix(k, prompt=True)
        if prompt is None:
            return None
        start, header = len(prompt), ""
        if not self.text.startswith(prompt):
            before = self.prefix(k)
            if not before or not (prompt.startswith(before) and self.text.startswith(before)):
                return None
            start, header = len(before), prompt[len(before) :]
        elif self.messages[k - 1]["role"] != "user":  # some add the header behind questions alone
            header = self.header
        for part in self._headers(header):
            if self.text.startswith(part, start):
                return start + len(part)
        return None if start < len(prompt) else start

    def _start(self, k: int, words_end: int) -> int:
        """Where the generation prompt before message `k` ends, as far as it is in the rendering."""
        question_end = self._question_end(k, words_end)
        always = "".join(
            self.template.pieces(self._after_question(self.question))[len(self.closing) :]
        )
        for header in (self.header, self._after_question(k), always):
            found = self._end_of_header(header, self.text[question_end:words_end])
            if found is not None:
                return question_end + found
        first = self.first_word(k)
        if first is not None and question_end <= first <= words_end:
            between = self.tokens(self.template.pieces(self.text[question_end:first]))
            if set(between) <= self.closers:
                return first
        raise self.no_turns(f"the generation prompt is not before message {k + 1}")

    def _question_end(self, k: int, words_end: int) -> int:
        """Where the last message before `k` ends of which something is in the rendering."""
        ends = []
        for j in reversed(range(k)):
            end = self.last_word(self.messages, self.text, j)
            if end is not None and end < words_end:
                ends.append(end)
                if self.messages[j]["role"] != "system":  # these may stand in front of all
                    break
        return max(ends, default=0)

    def _after_question(self, k: int) -> str:
        """What the template writes between the last message before `k` and an answer."""
        prompt, before = self.prefix(k, prompt=True), self.prefix(k)
        if prompt is None or before is None or not k:
            return ""
        end = self.last_word(self.messages[:k], before, k - 1)
        return "" if end is None else prompt[end:]

    @cached_property
    def question(self) -> int:
        """The number of messages up to a question for which the template renders a prompt."""
        asked = [k for k, message in enumerate(self.messages, 1) if message["role"] == "user"]
        others = [k for k, message in enumerate(self.messages, 1) if message["role"] == "tool"]
        for size in (*asked, *others):
            if self.prefix(size, prompt=True) is not None and self.prefix(size) is not None:
                return size
        return 0

    @cached_property
    def header(self) -> str:
        """What the template adds for an answer to a question; empty if nothing, or always."""
        asked: list[Message] = [{"role": "user", "content": self.probe}]
        messages = self.messages[: self.question] or asked
        opened, ended = (self.render(messages, prompt=prompt) for prompt in (True, False))
        if opened is None or ended is None:
            return ""
        pieces, more = self.template.pieces(ended), self.template.pieces(opened)
        return "".join(more[len(common_pieces(pieces, more)) :])

    def _end_of_header(self, header: str, text: str) -> int | None:
        """Where `header` ends in `text`, of marks of thoughts at its end as many as are there.

        White space may differ: some templates indent one of the two.
        """
        for part in self._headers(header):
            if (at := text.find(part)) >= 0:
                return at + len(part)
            words = [word for piece in self.finely(part) for word in piece.split()]
            pattern = r"\s*".join(map(re.escape, words)) + (r"\s*" if part[-1].isspace() else "")
            if found := re.search(pattern, text):
                return found.end()
        return None

    def _headers(self, header: str) -> Iterator[str]:
        """The header, and what is left of it without the marks of thoughts at its end."""
        pieces = self.finely(header)
        for size in range(len(pieces), 0, -1):
            if size < len(pieces) and not self._may_end(pieces[:size], pieces[size:]):
                continue
            if "".join(pieces[:size]).strip():
                yield "".join(pieces[:size])

    def _may_end(self, header: list[str], rest: list[str]) -> bool:
        """Whether marks of thoughts begin with `rest`, and not in the middle of them."""
        opened = {_name(piece) for piece in header if self.is_mark(piece) and piece.strip()}
        return self.is_mark(rest[0]) and not any(_name(piece) in opened for piece in rest)

    # Where it ends

    def _ending(self, k: int, words_end: int) -> Ending:
        """How the turn of message `k` ends, whose last word ends at `words_end`."""
        alone, last = self.prefix(k + 1), k + 1 == len(self.messages)
        end = alone and self.last_word(self.messages[: k + 1], alone, k)
        rest = alone[end:] if alone and end else None
        follow = self._continued(k) if last else self._followed(k, words_end)
        shown = [self._before_header(text) for text in (rest, follow) if text is not None]
        own, other = (shown[0], shown[-1]) if last else (shown[-1], shown[0])
        tokens = common_pieces(self.tokens(own), self.tokens(other))
        ends = [n for n, token in enumerate(tokens) if token in self.closers]
        if not ends and tokens and rest is not None and tokens[-1] not in self._inner(k):
            ends = [len(tokens) - 1]
        if not ends and last:  # a token that ends all, as `</s>` or `<|return|>`
            more = [token for token in self.tokens(own) if token not in self._inner(k)]
            ends = [self.tokens(own).index(token) for token in more[-1:]]
        if ends:
            closing = self.through_token(own, ends[0])
            return Ending(rest, closing, "", self.tokens(own)[ends[0]])
        common = "".join(common_pieces(own, other))
        token, blank = self.first_token((follow or "")[len(common) :])
        ended = rest is not None and len(self.tokens(shown[0])) > len(tokens)
        if not last and self.messages[k + 1]["role"] not in ("user", "tool"):
            usual = (self._continued(k) or "")[len(common) :]
            token = token if token == self.first_token(usual)[0] else ""
        if not token or ((token in self.openers or ended) and token not in self.closers):
            return Ending(rest, common, "", "")
        if last:
            return Ending(rest, rest or "", token, token)
        return Ending(rest, common + blank + token, "", token)

    def _followed(self, k: int, words_end: int) -> str:
        """What follows the last word of message `k`, up to the last word of the next message."""
        for j in range(k + 1, len(self.messages)):
            end = self.last_word(self.messages, self.text, j)
            if end is not None and end > words_end:
                return self.text[words_end:end]
            if end is not None and self.messages[j]["role"] != "system":
                raise self.no_turns(f"words of message {k + 1} stand behind message {j + 1}")
        return self.text[words_end:]

    def _continued(self, k: int) -> str | None:
        """What follows the last word of message `k` where a result or a question comes next."""
        more: list[Message] = [{"role": "user", "content": "Go on."}]
        if calls := self.messages[k].get("tool_calls"):
            named = {"name": calls[-1].get("function", calls[-1]).get("name")}
            named |= {"tool_call_id": calls[-1]["id"]} if "id" in calls[-1] else {}
            more = [{"role": "tool", "content": "Done.", **named}, *more]
        for following in more:
            longer = [*self.messages[: k + 1], following]
            text = self.render(longer)
            end = None if text is None else self.last_word(longer, text, k)
            if text is not None and end is not None:
                return text[end:]
        return None

    @cached_property
    def closing(self) -> list[str]:
        """The pieces that close a question, before the header of an answer."""
        return self._before_header(self._after_question(self.question))

    @cached_property
    def closers(self) -> set[str]:
        """Tokens that end a turn wherever they are: the tokenizer's own, and that of a question."""
        before = self.tokens(self.closing)
        asked = self.question and self.messages[self.question - 1]["role"] == "user"
        ends = before[:1] if asked else before[-1:]  # a result may be closed within its message
        return {str(self.template.tokenizer.eos_token), *ends}

    @cached_property
    def openers(self) -> set[str]:
        """Tokens that begin a header, of the assistant at least."""
        if self.header.strip():
            return set(self.tokens(self.template.pieces(self.header.lstrip())[:1]))
        tokenizer = self.template.tokenizer
        begin = takewhile(self.is_mark, self.template.pieces(self.text))
        return {piece for piece in begin if piece not in (tokenizer.bos_token, tokenizer.eos_token)}

    def _inner(self, k: int) -> set[str]:
        """Tokens after a call that another call may follow."""
        message = self.messages[k]
        if not message.get("tool_calls"):
            return set()
        calls = message["tool_calls"]
        for probed in after_call(calls[-1], self.probe):
            twice = {**message, "tool_calls": [*calls[:-1], probed, probed]}
            text = self.render([*self.messages[:k], twice])
            if text is not None and text.count(self.probe) == 2:
                between = text.split(self.probe)[1]
                return {piece for piece in self.template.pieces(between) if piece.strip()}
        return set()

    def _before_header(self, text: str) -> list[str]:
        """The pieces of a text before a token that begins a header."""
        pieces = self.template.pieces(text)
        return list(takewhile(lambda piece: piece not in self.openers, pieces))

    def _ends_before(self, k: int, span: Span, ending: Ending) -> bool:
        """Whether the end-of-turn token is in the turn before its end, and in no text of it."""
        if not ending.token:
            return False
        inside = self.text[slice(*span)].count(ending.token) - (not ending.appended)
        return inside > 0 and inside > str(self.messages[k]).count(ending.token)


def _name(mark: str) -> str:
    """What a mark shares with that which closes it: `<think>` and `</think>`, say."""
    return re.sub(r"\W|_|start|begin|end", "", mark.lower())
