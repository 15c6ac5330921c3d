"""Separates the thoughts of a model from its answer, by the marks that published models write.

The marks are tags (`<think>`, `<thought>`, `<seed:think>`), special tokens (`<|thinking|>`,
`<|START_THINKING|>`, `<|begin_of_thought|>`, `<|inner_prefix|>`, `[THINK]`, `◁think▷`,
`<unused94>`), channels (`<|channel|>analysis<|message|>`, `<|channel>thought`), and the sentences
of Granite and Apriel.
"""

from __future__ import annotations

import re
from bisect import bisect
from dataclasses import dataclass

_TAG = r"(?:[\w.-]{1,20}[:_])?(?:think(?:ing)?|thoughts?)"
_TOKEN = r"(?:think(?:ing)?|thoughts?|reasoning)"
_OPEN = (
    rf"<{_TAG}>|<[|｜](?:(?:begin|start)(?:[_▁]of)?[_▁])?{_TOKEN}(?:[_▁](?:begin|start))?[|｜]>"
    r"|<\|inner_prefix\|>|\[THINK\]|◁think▷|<unused94>(?:thought\b)?|<\|channel>(?:thought\b)?"
)
_CLOSE = (
    rf"</{_TAG}>|<[|｜](?:/|end(?:[_▁]of)?[_▁]){_TOKEN}[|｜]>|<[|｜]{_TOKEN}[_▁](?:end|stop)[|｜]>"
    r"|<\|inner_suffix\|>|\[/THINK\]|◁/think▷|<unused95>|<channel\|>|\[BEGIN FINAL RESPONSE\]"
    r"|<\|end\|>\s{0,9}<\|begin\|>assistant<\|content\|>"
)
_MARK = re.compile(rf"(?P<open>{_OPEN})|(?P<close>{_CLOSE})", re.IGNORECASE)
_QUOTED = re.compile(
    rf"`(?:{_OPEN}|{_CLOSE})`|(?<![^\s(\[])(['\"])(?:{_OPEN}|{_CLOSE})\1(?!\w)", re.I
)
#: Marks at the very beginning only: elsewhere these are words of an answer.
_LEADING = [
    (re.compile(rf"\s*{begin}", re.IGNORECASE), re.compile(end, re.IGNORECASE))
    for begin, end in (
        (r"<(?:reasoning|reflection|scratchpad)>", r"</(?:reasoning|reflection|scratchpad)>"),
        (r"<details type=[\"']reasoning[\"'][^>]{0,200}>", r"</details>"),
        (r"Here(?: is|['’]s) my thought process:", r"Here(?: is|['’]s) my response:"),
        (r"Here are my reasoning steps:", r"\[BEGIN FINAL RESPONSE\]"),
    )
]
#: What stands around an answer that follows on thoughts.
_WRAPPED = re.compile(
    r"\s*(?:<(answer|response|solution|output)>|<\|START_RESPONSE\|>"
    r"|<\|begin_of_(?:solution|box)\|>)?(.*?)"
    r"(?:</(?:answer|response|solution|output)>|<\|END_RESPONSE\|>|<\|end_of_(?:solution|box)\|>"
    r"|\[END FINAL RESPONSE\])?\s*",
    re.IGNORECASE | re.DOTALL,
)
# gpt-oss: one message for each channel; and the same after a server took the special tokens out.
_CHANNEL = re.compile(
    r"<\|channel\|>\s*(\w+)[^<]{0,200}(?:<\|constrain\|>[^<]{0,80})?<\|message\|>"
)
_MESSAGE_END = re.compile(r"<\|(?:end|return|call|start|channel)\|>")
_BARE_CHANNELS = re.compile(
    r"\s*analysis(?=[A-Z])(.*?)(?:assistant(?:commentary|final)(.*))?", re.S
)
_CHANNEL_TOKEN = re.compile(r"<\|(?:channel|message|start|end|begin|content|constrain)\|>")


@dataclass(frozen=True)
class Parted:
    """A text in two.

    Attributes:
        answer: the text itself if it has no thoughts; else what is left, without space around it.
        thoughts: without their marks; empty if there are none.
        unended: whether the text ends within thoughts, so that the answer has not begun.
    """

    answer: str
    thoughts: str = ""
    unended: bool = False


def without_thoughts(text: str, *, begun: bool = False) -> str:
    """Return the answer in a text; see `part_thoughts`."""
    return part_thoughts(text, begun=begun).answer


def part_thoughts(text: str, *, begun: bool = False) -> Parted:
    """Separate thoughts from the answer.

    Thoughts stand between two marks. Before an end whose beginning is missing all is thoughts: the
    template wrote the beginning into the prompt. After a beginning without an end all is thoughts:
    the text was cut off. A mark in quotes or in a block of code is a word of the answer.

    Args:
        text: that a model wrote.
        begun: whether the prompt ends within thoughts, as `begins_thoughts` finds.
    """
    if _CHANNEL.search(text):
        return _of_channels(text, begun)
    if bare := _BARE_CHANNELS.fullmatch(text):
        return Parted((bare[2] or "").strip(), bare[1].strip(), unended=bare[2] is None)
    for opening, closing in _LEADING:
        if begin := opening.match(text):
            end = closing.search(text, begin.end())
            thoughts = text[begin.end() : end.start() if end else None].strip()
            return Parted(_unwrapped(text[end.end() :]) if end else "", thoughts, end is None)
    return _between_marks(text, begun)


def begins_thoughts(prompt: str) -> bool:
    """Return whether a prompt, special tokens included, ends with the beginning of thoughts."""
    tail = prompt.rstrip()[-200:]
    if any(match.end() == len(tail) for match in _CHANNEL.finditer(tail)):
        return not tail.endswith("final<|message|>")
    last_line = tail[tail.rfind("\n") + 1 :]
    if any(opening.fullmatch(last_line) for opening, _ in _LEADING):
        return True
    marks = list(_MARK.finditer(tail))
    return bool(marks) and marks[-1]["open"] is not None and marks[-1].end() == len(tail)


def is_mark(token: str) -> bool:
    """Return whether a special token is, or is part of, a mark of thoughts."""
    return bool(_MARK.fullmatch(token) or _CHANNEL_TOKEN.fullmatch(token))


def is_end(token: str) -> bool:
    """Return whether a token ends thoughts."""
    mark = _MARK.fullmatch(token)
    return mark is not None and mark["close"] is not None


def _between_marks(text: str, begun: bool) -> Parted:
    quoted = {match.start() + 1 for match in _QUOTED.finditer(text)}
    marks = [match for match in _MARK.finditer(text) if match.start() not in quoted]
    answer: list[str] = []
    thoughts: list[str] = []
    inside, at = begun, 0
    opening: re.Match[str] | None = None
    nested = in_code = 0  # beginnings within thoughts, and in a block of code
    fences = [match.start() for match in re.finditer("```", text)]
    for mark in marks:  # nothing here looks at all of the text: a hostile one has a million marks
        if mark["open"] is not None:
            if inside:
                nested += 1
            elif (bisect(fences, mark.start()) - bisect(fences, at - 1)) % 2:
                in_code += 1
            else:
                answer.append(text[at : mark.start()])
                inside, at, opening = True, mark.end(), mark
        elif inside:
            thoughts.append(text[at : mark.start()])
            inside, at = False, mark.end()
        elif in_code:
            in_code -= 1
        elif nested or not thoughts:
            thoughts += [*answer, text[at : mark.start()]]
            answer, at, nested = [], mark.end(), max(0, nested - 1)
    rest = text[at:]
    unended = inside and (opening is None or _stands_alone(opening))
    if unended:
        thoughts.append(rest)
    else:
        answer += [opening[0], rest] if inside and opening is not None else [rest]
    if not thoughts:
        return Parted(text)
    kept = "".join(answer)
    return Parted(kept.strip() if unended else _unwrapped(kept), "".join(thoughts).strip(), unended)


def _stands_alone(mark: re.Match[str]) -> bool:
    """Return whether a beginning without an end is one: a special token, or a tag on a new line."""
    before = mark.string[: mark.start()].rstrip(" \t")
    return not mark[0].startswith("<") or mark[0][1] in "|｜u" or before[-1:] in ("", "\n")


def _unwrapped(answer: str) -> str:
    found = _WRAPPED.fullmatch(answer)
    assert found is not None, "everything in the pattern is optional"
    return found[2].strip()


def _of_channels(text: str, begun: bool) -> Parted:
    answer: list[str] = []
    thoughts: list[str] = []
    first = _MESSAGE_END.search(text)
    assert first is not None, "there is a channel"
    head = text[: first.start()]
    (thoughts if begun else answer).append(head)
    for message in _CHANNEL.finditer(text):
        end = _MESSAGE_END.search(text, message.end())
        body = text[message.end() : end.start() if end else None]
        (thoughts if message[1].casefold() == "analysis" else answer).append(body)
    kept = "".join(answer).strip()
    return Parted(kept, "\n".join(thoughts).strip(), unended=not kept)
