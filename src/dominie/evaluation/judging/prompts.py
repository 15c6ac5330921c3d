"""Prompts for judges: templates filled so that nothing in an answer can end the answer."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from dominie.evaluation.judging.verdicts import disarmed

_FIELD = re.compile(r"\{([a-z_]+[0-9]?(?:_[0-9])?)\}")
_TURN = re.compile(r"<\|im_start\|>(system|user|assistant)\n(.*?)\n?<\|im_end\|>", re.DOTALL)
# What chat templates of all families take for the end of a turn or the beginning of another.
_CONTROL = r"<\|[^<>|\s]{1,40}\|>|\[/?INST\]|<</?SYS>>|</?s>|<(?:start|end)_of_turn>"
_SIGNS = re.compile(r"[^\w\s'’]|_(?=_)")

Message = dict[str, str]


@dataclass(frozen=True)
class Prompt:
    """What a judge is told, with `{fields}` for what it judges.

    Attributes:
        name: what it is called in the records.
        text: what the user says, the fields in braces.
        system: what the system says, None for nothing.
        verdict: how the judge is asked to give its verdict.
    """

    name: str
    text: str
    system: str | None = None
    verdict: Literal["rating", "letter", "ranking", "identifier"] = "rating"

    @property
    def fields(self) -> set[str]:
        """The names in braces."""
        return set(_FIELD.findall(self.text))

    def messages(self, trusted: Mapping[str, str], answers: Mapping[str, str]) -> list[Message]:
        """The chat to send.

        Args:
            trusted: fields as they are: questions and references.
            answers: fields a judged model has written. Whatever in them looks like a delimiter of
                this prompt or of a chat template is escaped, whatever looks like a verdict is
                spaced out.
        """
        guard = _guard(self.text)
        shown = {name: disarmed(guard.sub(_escaped, text)) for name, text in answers.items()}
        values = {**trusted, **shown}

        def filled(text: str) -> str:  # in one pass: a field's name in an answer is just text
            return _FIELD.sub(lambda m: values.get(m[1], m.group()), text)

        turns = [(m[1], m[2]) for m in _TURN.finditer(self.text)] or [("user", self.text)]
        if self.system:
            turns.insert(0, ("system", self.system))
        return [{"role": role, "content": filled(text)} for role, text in turns]


def _guard(template: str) -> re.Pattern[str]:
    """Finds what must not stand in an answer: the template's marker lines, and control tokens."""
    lines = {line.strip() for line in _FIELD.sub("\n", template).splitlines()}
    markers = {line for line in lines if len(line) >= 3 and not line[0].isalnum()}
    loosely = [
        r"\s*".join(re.escape(word).replace("'", "['’`´]?") for word in line.split())
        for line in sorted(markers, key=len, reverse=True)
    ]
    return re.compile("|".join([*loosely, _CONTROL]), re.IGNORECASE)


def _escaped(match: re.Match[str]) -> str:
    """A delimiter with a backslash before every sign of it: to be read, not to be obeyed."""
    return _SIGNS.sub(lambda sign: "\\" + sign.group(), match.group())
