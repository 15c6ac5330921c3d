"""Controls of a judged benchmark: what says nothing has to lose, and length alone must not win."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dominie.evaluation.answers import Answers
from dominie.evaluation.benchmarks import Exam, Judged
from dominie.evaluation.judging.calls import Advance, Calls
from dominie.evaluation.judging.judge import enough_scored, verdicts

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


def constant_controls(exam: Exam, calls: Calls, advance: Advance) -> dict[str, Any]:
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
    exam: Exam, answers: Answers, calls: Calls, advance: Advance, *, model: str
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
