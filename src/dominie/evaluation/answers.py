"""Answers to benchmark questions: asked for once, kept as they come, found again by their key."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from dominie.errors import InputError
from dominie.evaluation.judging.calls import Advance
from dominie.evaluation.judging.ledger import Ledger, call_key

#: Answers by the id of their dialogue, one text for each turn.
Answers = Mapping[int | str, Sequence[str]]


@dataclass(frozen=True)
class Dialogue:
    """What a model is asked, turn by turn; each answer stays in sight of the next question.

    Attributes:
        id: of the question.
        turns: what the user says.
        temperature: of the answers.
    """

    id: int | str
    turns: tuple[str, ...]
    temperature: float = 0.0


Done = Callable[[Dialogue, Sequence[str]], None]


class Speaker(Protocol):
    """Whoever answers."""

    @property
    def identity(self) -> Mapping[str, Any]:
        """All that its answers depend on, the dialogue aside."""

    def speak(self, dialogues: Sequence[Dialogue], done: Done, advance: Advance) -> None:
        """Answer, calling `done` as soon as a dialogue is complete, in any order."""


class AnswerFile:
    """Answers in a benchmark's published shape, one line each, with a `key` beside it.

    Args:
        path: JSON Lines.
        line: a dialogue and its answers as the benchmark writes them.
        turns: the answers in such a line.
    """

    def __init__(
        self,
        path: Path,
        *,
        line: Callable[[Dialogue, Sequence[str]], dict[str, Any]],
        turns: Callable[[Mapping[str, Any]], Sequence[str]],
    ) -> None:
        self.path, self._line, self._turns = path, line, turns

    def complete(
        self, dialogues: Sequence[Dialogue], speaker: Speaker, advance: Advance
    ) -> Answers:
        """All answers: those in the file that are still true, the others asked for now.

        When all are there, the file is rewritten to hold them alone, in the order of the questions.

        Raises:
            InputError: a line that does not hold answers.
        """
        ledger = Ledger(self.path)
        keys = {d.id: call_key(speaker.identity, d.turns, d.temperature) for d in dialogues}
        found = {d.id: self._read(kept[-1]) for d in dialogues if (kept := ledger.of(keys[d.id]))}

        def done(dialogue: Dialogue, turns: Sequence[str]) -> None:
            ledger.append({"key": keys[dialogue.id], **self._line(dialogue, turns)})
            found[dialogue.id] = list(turns)

        waiting = [d for d in dialogues if d.id not in found]
        try:
            if waiting:
                speaker.speak(waiting, done, advance)
        finally:
            ledger.close()
        self._rewrite([ledger.of(keys[d.id])[-1] for d in dialogues])
        return {d.id: found[d.id] for d in dialogues}

    def _read(self, record: Mapping[str, Any]) -> Sequence[str]:
        try:
            turns = self._turns(record)
            if all(isinstance(turn, str) for turn in turns):
                return turns
        except (LookupError, TypeError):
            pass
        raise InputError(
            "a line that holds no answers",
            where=str(self.path),
            found=json.dumps(record)[:120],
            do="remove this line; the question is then asked again",
        )

    def _rewrite(self, records: Sequence[Mapping[str, Any]]) -> None:
        text = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
        if self.path.exists() and self.path.read_text(encoding="utf-8") == text:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        scratch = self.path.with_name(f".{self.path.name}")
        scratch.write_text(text, encoding="utf-8")
        scratch.replace(self.path)
