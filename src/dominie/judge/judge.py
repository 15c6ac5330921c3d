"""Asks a judge about many cases, and controls whether it can be believed."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

from dominie.core.display import Advance
from dominie.generation.calls import Ask, Calls
from dominie.generation.endpoint import STRICT, Endpoint
from dominie.generation.reply_log import Reply, call_key
from dominie.judge.prompts import READERS, Message, Prompt

if TYPE_CHECKING:
    from dominie.judge.benchmark import Answers, Benchmark, Judged

#: Below this share of verdicts that could be read, no figure is given for the whole.
LEAST_SCORED = 0.95
#: Added to the temperature if a verdict could not be read, or the reply would be the same.
_RETRY_TEMPERATURE = 0.3
_MOST_TEMPERATURE = 1.0  # of these; some servers allow no more
#: First tokens that are no verdict, from the first on, before no more are asked for: it thinks.
_THINKS = 3

#: Why a verdict is missing.
CALL_FAILED, CUT_OFF = "a call failed", "cut off at max_tokens"
_REFUSED, _UNREADABLE = "refused by a filter", "without a verdict"


@dataclass(frozen=True, kw_only=True)
class Judge(Endpoint):
    """A model that judges, behind an endpoint.

    Attributes:
        temperature: of its replies.
        max_tokens: longest reply, thoughts included. Verdicts of one token take one, unless the
            judge thinks first.
        tries: how often it is asked in one run if its verdict cannot be read; a token alone is no
            try.
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
    """A case for a judge: one answer, or two to compare.

    Attributes:
        messages: the chat that is sent.
        quoted: the answers in it, as their models wrote them.
    """

    prompt: Prompt
    messages: list[Message]
    quoted: tuple[str, ...]


@dataclass(frozen=True)
class Verdict:
    """A judge's verdict on a case.

    Attributes:
        value: a rating, a letter or a preference; None is unscored.
        text: the reply it was read from, or the last that could not be read.
        tries: replies it took, over all runs.
        missing: why it is unscored.
    """

    value: float | str | None
    text: str
    tries: int
    missing: str | None = None

    @property
    def number(self) -> float | None:
        """The value as a number, None if it is unscored."""
        return None if self.value is None else float(self.value)


def verdicts(judge: Judge, cases: Sequence[Case], calls: Calls, advance: Advance) -> list[Verdict]:
    """Return the judge's verdict on each case, from the reply log if it gave one before.

    Equal cases are asked once. An unreadable reply is asked for again, now and in later runs.
    """
    keys = [
        call_key(
            judge.identity,
            _token_body(judge, case) if _is_by_token(judge, case) else _body(judge, case, 0),
        )
        for case in cases
    ]
    waiting = dict(zip(keys, cases, strict=True))
    known = {key: _known(case, key, calls) for key, case in waiting.items()}
    first_tokens: list[bool] = []  # whether each was a verdict

    async def ask_until_read(item: tuple[str, Case], ask: Ask) -> Verdict:
        key, case = item
        verdict = known[key]
        bodies = [_body(judge, case, attempt) for attempt in range(judge.tries)]
        thinks = len(first_tokens) >= _THINKS and not any(first_tokens)
        by_token = _is_by_token(judge, case) and not verdict.tries and not thinks
        if by_token:
            bodies.insert(0, _token_body(judge, case))
        for attempt, body in enumerate(bodies):
            reply = await ask(key, body)
            if reply is None:
                return replace(verdict, missing=CALL_FAILED)
            verdict = _verdict(reply, case, verdict.tries + 1)
            if by_token and attempt == 0:
                first_tokens.append(verdict.value is not None)
            if verdict.value is not None:
                break
        return verdict

    open_ones = [(key, case) for key, case in waiting.items() if known[key].value is None]
    found = calls.run(open_ones, ask_until_read, advance)
    known |= {key: verdict for (key, _), verdict in zip(open_ones, found, strict=True)}
    return [known[key] for key in keys]


def enough_scored(scored: int, total: int) -> bool:
    """Return whether enough verdicts were read for a figure."""
    return scored > 0 and scored >= LEAST_SCORED * total


def _body(judge: Judge, case: Case, attempt: int) -> dict[str, Any]:
    warmer = min(judge.temperature + _RETRY_TEMPERATURE * attempt, _MOST_TEMPERATURE)
    temperature = round(max(judge.temperature, warmer), 6)
    return judge.body(case.messages, {"temperature": temperature, "max_tokens": judge.max_tokens})


def _is_by_token(judge: Judge, case: Case) -> bool:
    return case.prompt.verdict == "identifier" and judge.logprobs


def _token_body(judge: Judge, case: Case) -> dict[str, Any]:
    odds = {"max_tokens": 1, "logprobs": True, "top_logprobs": 5}
    return judge.body(case.messages, {"temperature": round(judge.temperature, 6), **odds})


def _verdict(reply: Reply, case: Case, tries: int) -> Verdict:
    value = None if reply.refused else READERS[case.prompt.verdict](reply, case.quoted)
    missing = _REFUSED if reply.refused else CUT_OFF if reply.cut else _UNREADABLE
    return Verdict(value, reply.text, tries, missing if value is None else None)


def _known(case: Case, key: str, calls: Calls) -> Verdict:
    """Return the latest verdict in the log, or none, with the replies it took so far."""
    replies = calls.log.replies(key)
    found = [_verdict(reply, case, len(replies)) for reply in reversed(replies)]
    read = [verdict for verdict in found if verdict.value is not None]
    return next(iter(read or found), Verdict(None, "", 0))


_MODEL_FAMILIES = {
    "OpenAI": r"gpt|chatgpt|davinci|\bo[134]\b",
    "Anthropic": r"claude",
    "Google": r"gemini|gemma|palm|bard",
    "Llama": r"llama|vicuna|alpaca|tulu|guanaco",
    "Mistral": r"mistral|mixtral|zephyr|ministral|magistral",
    "Qwen": r"qwen|qwq",
    "DeepSeek": r"deepseek",
    "Phi": r"\bphi",
    "Cohere": r"command|aya|cohere",
    "GLM": r"glm",
    "Yi": r"\byi\b",
    "Falcon": r"falcon",
    "OLMo": r"olmo",
}


def model_families(name: str) -> set[str]:
    """Return the model families that a model's name mentions."""
    spaced = re.sub(r"[-_/.:]+", " ", name.casefold())
    return {family for family, pattern in _MODEL_FAMILIES.items() if re.search(pattern, spaced)}


def same_family_warning(judge: str, names: Iterable[str]) -> str | None:
    """Return a warning if the judge is of the family of a model or of one that taught it.

    Args:
        judge: name of the judge.
        names: what the model is, started from and was taught by: hub ids, folders, architectures.
    """
    names = list(names)
    if judge in names:
        return f"the judge {judge} judges itself"
    for name in names:
        if shared := model_families(judge) & model_families(name):
            family = " and ".join(sorted(shared))
            return (
                f"the judge {judge} and {name} are of one family ({family}): "
                "judges favour their own; confirm with a judge of another"
            )
    return None


#: Answers that are the same whatever was asked.
CONSTANT_ANSWERS = {
    "empty": "",
    "constant": (
        "Thank you for this interesting question. There are many aspects to consider here, and the "
        "best approach depends on your situation. I hope this helps; let me know if you would like "
        "to hear more about any of them."
    ),
}

_MANY_FLIPS = 0.2
_LONGER_WINS = 0.75
_STRONG_CORRELATION = 0.5


def constant_controls(benchmark: Benchmark, calls: Calls, advance: Advance) -> dict[str, Any]:
    """Return how the judge scores an empty and a constant answer, on a sample of the questions.

    A constant answer must score low, and length alone must not explain the scores.
    """
    found = {}
    for name, text in CONSTANT_ANSWERS.items():
        answers = {d.id: [text] * len(d.turns) for d in benchmark.control_dialogues}
        judged = judged_answers(benchmark, answers, calls, advance, model=f"control-{name}")
        kept = ("score", "stderr", "n", "interval", "win_rate") if "score" in judged.figures else ()
        found[name] = {key: judged.figures[key] for key in kept if key in judged.figures}
        found[name]["unscored"] = judged.total - judged.scored
    return found


def judged_answers(
    benchmark: Benchmark,
    answers: Answers,
    calls: Calls,
    advance: Advance,
    *,
    model: str,
    unanswered: Collection[int | str] = (),
) -> Judged:
    """Return the judge's results on answers; without a score if too few verdicts were read.

    Args:
        unanswered: dialogues that the model did not answer; their verdicts are missing.
    """
    found = verdicts(benchmark.judge, benchmark.cases(answers), calls, advance)
    judged = benchmark.judged(answers, found, model)
    blank = {d.id: [""] * len(d.turns) for d in benchmark.dialogues if d.id in unanswered}
    judged = replace(judged, total=judged.total + len(benchmark.cases(blank)))
    judged.figures.update(unscored=judged.total - judged.scored, judge=benchmark.judge.model)
    if missing := Counter(verdict.missing for verdict in found if verdict.missing):
        judged.figures["unscored_because"] = dict(missing.most_common())
    if not enough_scored(judged.scored, judged.total):
        for name in ("score", "stderr", "n", "interval"):
            judged.figures.pop(name, None)
    return judged


def control_warnings(figures: Mapping[str, Any]) -> list[str]:
    """Return warnings that a person should read before believing a result."""
    found = []
    controls, (low, _) = figures["controls"], figures["interval"]
    for name in CONSTANT_ANSWERS:
        score = controls.get(name, {}).get("score")
        if score is not None and score >= low:
            found.append(
                f"an answer that is {name} scores {100 * score:.0f} %, as much as the model: "
                "this judge does not distinguish answers here"
            )
    length = controls.get("length_only", {})
    control = str(figures.get("length_control", ""))
    if control.startswith("none: "):
        found.append(f"there is no win rate at equal length: {control.removeprefix('none: ')}")
    if (length.get("longer_answer_wins") or 0) > _LONGER_WINS:
        found.append(
            f"the longer answer won {100 * length['longer_answer_wins']:.0f} % of decided pairs"
            + (
                ": read the win rate at equal length"
                if "length_controlled_win_rate" in figures
                else ""
            )
        )
    if abs(length.get("correlation") or 0) > _STRONG_CORRELATION:
        found.append(f"ratings follow length (rank correlation {length['correlation']:.2f})")
    if figures.get("order_flips", 0) > _MANY_FLIPS:
        found.append(
            f"{100 * figures['order_flips']:.0f} % of verdicts flip with the order of the answers"
        )
    return found
