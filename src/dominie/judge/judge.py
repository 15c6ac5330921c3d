"""Asks a judge about many cases: verdicts, and how many could not be had."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from dominie.generation.calls import Advance, Ask, Calls, call_key
from dominie.generation.client import Reply, read_reply
from dominie.generation.endpoint import STRICT, Endpoint
from dominie.judge.judge_prompts import Message, Prompt
from dominie.judge.verdicts import identifier, letter, ranking, rating

#: Below this share of verdicts that could be read, no figure is given for the whole.
LEAST_SCORED = 0.95
_WARMER = (
    0.3  # added to the temperature where a verdict could not be read, or it would read the same
)

_READERS: dict[str, Callable[[Reply, Sequence[str]], float | str | None]] = {
    "rating": rating,
    "letter": letter,
    "ranking": ranking,
    "identifier": identifier,
}


@dataclass(frozen=True, kw_only=True)
class Judge(Endpoint):
    """A model that judges.

    Attributes:
        temperature: of its replies.
        max_tokens: longest reply; verdicts of one token take one.
        tries: how often it is asked in one run where its verdict cannot be read.
        logprobs: whether verdicts of one token are weighed by its odds; some servers have none.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT
    temperature: float = 0.0
    max_tokens: int = 2048
    tries: int = 3
    logprobs: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.temperature <= 2:
            raise ValueError(f"temperature is from 0 to 2, got {self.temperature}")
        if self.max_tokens < 1:
            raise ValueError(f"max_tokens must be at least 1, got {self.max_tokens}")
        if not 1 <= self.tries <= 10:
            raise ValueError(f"tries is from 1 to 10, got {self.tries}")


@dataclass(frozen=True)
class Case:
    """Something to be judged.

    Attributes:
        prompt: what it is judged by.
        messages: what the judge is sent.
        quoted: the answers in it, as their models wrote them.
    """

    prompt: Prompt
    messages: list[Message]
    quoted: tuple[str, ...]


@dataclass(frozen=True)
class Verdict:
    """What a judge made of a case.

    Attributes:
        value: a rating, a letter or a preference; None is unscored.
        text: the reply it was read from, or the last that could not be read.
        tries: replies it took, over all runs.
    """

    value: float | str | None
    text: str
    tries: int

    @property
    def number(self) -> float | None:
        """The value as a number, None where it is unscored."""
        return None if self.value is None else float(self.value)


def verdicts(judge: Judge, cases: Sequence[Case], calls: Calls, advance: Advance) -> list[Verdict]:
    """The judge's verdict on each case, from the ledger where it gave one before.

    Equal cases are asked once. An unreadable reply is asked for again, now and in later runs.

    Args:
        judge: whom to ask.
        cases: what to judge.
        calls: to that judge.
        advance: shows progress.
    """
    keys = [call_key(judge.identity, _body(judge, case, 0)) for case in cases]
    waiting = dict(zip(keys, cases, strict=True))
    known = {key: _known(case, key, calls) for key, case in waiting.items()}

    async def asked(item: tuple[str, Case], ask: Ask) -> Verdict:
        key, case = item
        verdict = known[key]
        for attempt in range(judge.tries):
            reply = await ask(key, _body(judge, case, attempt))
            if reply is None:
                break
            verdict = Verdict(_read(reply, case), reply.text, verdict.tries + 1)
            if verdict.value is not None:
                break
        return verdict

    open_ones = [(key, case) for key, case in waiting.items() if known[key].value is None]
    found = calls.over(open_ones, asked, advance)
    known |= {key: verdict for (key, _), verdict in zip(open_ones, found, strict=True)}
    return [known[key] for key in keys]


def enough_scored(scored: int, total: int) -> bool:
    """Whether a figure may stand for the whole."""
    return scored > 0 and scored >= LEAST_SCORED * total


def _body(judge: Judge, case: Case, attempt: int) -> dict[str, Any]:
    sampling: dict[str, Any] = {
        "temperature": round(judge.temperature + _WARMER * attempt, 6),
        "max_tokens": judge.max_tokens,
    }
    if case.prompt.verdict == "identifier" and judge.logprobs:
        sampling |= {"max_tokens": 1, "logprobs": True, "top_logprobs": 5}
    return judge.body(case.messages, sampling)


def _read(reply: Reply, case: Case) -> float | str | None:
    return _READERS[case.prompt.verdict](reply, case.quoted)


def _known(case: Case, key: str, calls: Calls) -> Verdict:
    """The latest verdict in the ledger, or none, with the replies it took so far."""
    bodies = [record["body"] for record in calls.ledger.of(key) if record["status"] == 200]
    replies = [reply for body in bodies if (reply := read_reply(body)) is not None]
    for reply in reversed(replies):
        value = _read(reply, case)
        if value is not None:
            return Verdict(value, reply.text, len(replies))
    return Verdict(None, replies[-1].text if replies else "", len(replies))
