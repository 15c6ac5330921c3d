"""Controls of a judged benchmark: a constant answer must score low, whatever its length."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from dominie.generation.calls import Advance, Calls
from dominie.judge.benchmark import Answers, Benchmark, Judged
from dominie.judge.judge import enough_scored, verdicts

_FAMILIES = {
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


def families(name: str) -> set[str]:
    """The families that the name of a model speaks of."""
    spaced = re.sub(r"[-_/.:]+", " ", name.casefold())
    return {family for family, words in _FAMILIES.items() if re.search(words, spaced)}


def kinship_warning(judge: str, names: Iterable[str]) -> str | None:
    """A sentence where the judge is of the family of a model or of one it learnt from.

    Args:
        judge: name of the judge.
        names: what the model is, started from and was taught by: hub ids, folders, architectures.
    """
    names = list(names)
    if judge in names:
        return f"the judge {judge} judges itself"
    for name in names:
        shared = families(judge) & families(name)
        if shared:
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


def constant_controls(exam: Benchmark, calls: Calls, advance: Advance) -> dict[str, Any]:
    """How the judge likes an empty and a constant answer, on the sample of the questions."""
    found = {}
    for name, text in CONSTANT_ANSWERS.items():
        answers = {d.id: [text] * len(d.turns) for d in exam.sample}
        judged = judged_answers(exam, answers, calls, advance, model=f"control-{name}")
        kept = ("score", "stderr", "n", "interval", "win_rate") if "score" in judged.figures else ()
        found[name] = {key: judged.figures[key] for key in kept if key in judged.figures}
        found[name]["unscored"] = judged.total - judged.scored
    return found


def judged_answers(
    exam: Benchmark, answers: Answers, calls: Calls, advance: Advance, *, model: str
) -> Judged:
    """What the exam's judge makes of answers; without a score where too few verdicts were read."""
    found = verdicts(exam.judge, exam.cases(answers), calls, advance)
    judged = exam.judged(answers, found, model)
    judged.figures.update(unscored=judged.total - judged.scored, judge=exam.judge.model)
    if not enough_scored(judged.scored, judged.total):
        for name in ("score", "stderr", "n", "interval"):
            judged.figures.pop(name, None)
    return judged


def control_warnings(figures: Mapping[str, Any]) -> list[str]:
    """What a person should know before believing a result, in sentences."""
    told = []
    controls, (low, _) = figures["controls"], figures["interval"]
    for name in CONSTANT_ANSWERS:
        score = controls.get(name, {}).get("score")
        if score is not None and score >= low:
            told.append(
                f"an answer that is {name} scores {100 * score:.0f} %, as much as the model: "
                "this judge does not tell answers apart here"
            )
    length = controls.get("length_only", {})
    if "length_controlled_win_rate" in figures and not 0.02 <= length.get("longer", 0.5) <= 0.98:
        told.append(
            "hardly any pair of answers is of like length: the rate at equal length is extrapolated"
        )
    if (length.get("longer_answer_wins") or 0) > _LONGER_WINS:
        told.append(
            f"the longer answer won {100 * length['longer_answer_wins']:.0f} % of decided pairs: "
            "read the win rate at equal length"
        )
    if abs(length.get("correlation") or 0) > _STRONG_CORRELATION:
        told.append(f"ratings follow length (rank correlation {length['correlation']:.2f})")
    if figures.get("order_flips", 0) > _MANY_FLIPS:
        told.append(
            f"{100 * figures['order_flips']:.0f} % of verdicts flip with the order of the answers"
        )
    return told
