"""MT-Bench (arXiv 2306.05685): two turns, rated from 1 to 10, or compared with a baseline's."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any, Literal

from dominie.core.references import PathName
from dominie.data.json_files import lost_characters
from dominie.evaluation.statistics import spearman
from dominie.generation.reply_log import call_key
from dominie.generation.thoughts import without_thoughts
from dominie.judge.benchmark import (
    Answers,
    Benchmark,
    BenchmarkSettings,
    Dialogue,
    Judged,
    failed_answers,
    interval_figures,
    paired_items,
)
from dominie.judge.judge import Case, Verdict
from dominie.judge.published_files import (
    ARENA_HARD,
    REFERENCED,
    MtQuestion,
    default_prompts,
    read_answers,
    read_prompts,
    read_questions,
    reference_ids,
)

#: Sampling temperatures of upstream's generation, by category; others are sampled at 0.7.
TEMPERATURES = {
    "writing": 0.7,
    "roleplay": 0.7,
    "extraction": 0.0,
    "math": 0.0,
    "coding": 0.0,
    "reasoning": 0.0,
    "stem": 0.1,
    "humanities": 0.1,
    "arena-hard-200": 0.0,
}
_OTHER_TEMPERATURE = 0.7


@dataclass(frozen=True, kw_only=True)
class MtBench(BenchmarkSettings):
    """MT-Bench in a recipe.

    Attributes:
        kind: tells it from other benchmarks.
        questions: upstream's `question.jsonl`.
        references: upstream's reference answers for math, reasoning and coding: a file, or a folder
            with one; whose answers they are does not matter.
        prompts: upstream's `judge_prompts.jsonl`; None takes default ones, and the result says so.
        baseline: another model's answers in upstream's shape, to be compared with in both orders.
    """

    questions: PathName
    kind: Literal["mt_bench"] = "mt_bench"
    references: PathName | None = None
    prompts: PathName | None = None
    baseline: PathName | None = None

    def load(self) -> LoadedMtBench:
        """Return the benchmark with its files read.

        Raises:
            InputError: a file is missing or malformed, or a question lacks its reference.
        """
        return LoadedMtBench(self)


class LoadedMtBench(Benchmark):
    """MT-Bench with its files read."""

    def __init__(self, settings: MtBench) -> None:
        questions = read_questions(settings.questions, settings.references)
        self.questions = questions[: settings.limit]
        self.prompts = read_prompts(settings.prompts) if settings.prompts else default_prompts()
        self.baseline: Answers | None = None
        if settings.baseline:
            given = read_answers(settings.baseline, self.questions, what="baseline answers")
            self.baseline = (
                given
                if settings.keep_thoughts
                else {of: [without_thoughts(text) for text in texts] for of, texts in given.items()}
            )
        dialogues = [
            Dialogue(q.id, q.turns, TEMPERATURES.get(q.kind, _OTHER_TEMPERATURE))
            for q in self.questions
        ]
        baseline = {f"question {key}": turns for key, turns in (self.baseline or {}).items()}
        notes = [
            _unused_references(self.questions, settings.references),
            _other_temperature(self.questions),
            failed_answers(baseline, "baseline answers"),
            lost_characters([" ".join(q.turns) for q in self.questions], "questions"),
            lost_characters([" ".join(map(str, t)) for t in baseline.values()], "baseline answers"),
        ]
        super().__init__(settings, dialogues, notes)

    def answer_row(self, dialogue: Dialogue, turns: Sequence[str], model: str) -> dict[str, Any]:
        """Return a row of upstream's `model_answer` files."""
        return {
            "question_id": dialogue.id,
            "answer_id": call_key(model, dialogue.id, list(turns))[:22],
            "model_id": model,
            "choices": [{"index": 0, "turns": list(turns)}],
            "tstamp": time.time(),
        }

    def answers_in(self, row: Mapping[str, Any]) -> Sequence[str]:
        """Return the answers in such a row."""
        found: Sequence[str] = row["choices"][0]["turns"]
        return found

    def cases(self, answers: Answers) -> list[Case]:
        """Return a rating of each turn, then comparisons of each turn in both orders."""
        rated = [self._rating(question, turn, answers) for question, turn in self._rounds(answers)]
        if self.baseline is None:
            return rated
        compared = [
            self._comparison(question, turn, *pair)
            for question, turn in self._rounds(answers)
            for pair in ((answers, self.baseline), (self.baseline, answers))
        ]
        return rated + compared

    def judged(self, answers: Answers, verdicts: Sequence[Verdict], model: str) -> Judged:
        """Return the mean rating, by category and turn; with a baseline, the win rate."""
        rounds = self._rounds(answers)
        ratings = list(zip(rounds, verdicts[: len(rounds)], strict=True))
        figures: dict[str, Any] = {"metric": "mt_bench", "prompt": self.prompts.origin}
        figures |= _rating_figures(
            [(q, turn, v.number) for (q, turn), v in ratings if v.number is not None], answers
        )
        lines = [self._judgment(q, t, v, answers, model) for (q, t), v in ratings]
        files = {"judgments.jsonl": lines}
        if self.baseline is not None:
            won, files["comparisons.jsonl"] = self._won(rounds, verdicts[len(rounds) :], model)
            figures |= won
        rows = [self._row(question, answers, ratings) for question in self._answered(answers)]
        scored = sum(v.value is not None for v in verdicts)
        places = {question.id: i for i, question in enumerate(self.questions)}
        items = paired_items(
            [None if v.number is None else v.number / 10 for _, v in ratings],
            [places[question.id] for (question, _), _ in ratings],
        )
        return Judged(figures, scored, len(verdicts), rows, files, items)

    def _answered(self, answers: Answers) -> list[MtQuestion]:
        return [question for question in self.questions if question.id in answers]

    def _rounds(self, answers: Answers) -> list[tuple[MtQuestion, int]]:
        """Return every (question, turn); turns count from 1."""
        questions = self._answered(answers)
        return [(q, turn) for q in questions for turn in range(1, len(q.turns) + 1)]

    def _rating(self, question: MtQuestion, turn: int, answers: Answers) -> Case:
        prompt = self.prompts.rating[question.needs_reference, turn]
        texts = answers[question.id]
        shown = {"answer": texts[0], "answer_1": texts[0], "answer_2": texts[turn - 1]}
        messages = prompt.messages(question.trusted, shown)
        return Case(prompt, messages, tuple(texts[:turn]))

    def _comparison(self, question: MtQuestion, turn: int, a: Answers, b: Answers) -> Case:
        prompt = self.prompts.comparison[question.needs_reference, turn]
        shown: dict[str, str] = {}
        for side, answers in (("a", a), ("b", b)):
            texts = answers[question.id]
            shown |= {
                f"answer_{side}": texts[0],
                f"answer_{side}_1": texts[0],
                f"answer_{side}_2": texts[turn - 1],
            }
        messages = prompt.messages(question.trusted, shown)
        return Case(prompt, messages, (*a[question.id][:turn], *b[question.id][:turn]))

    def _won(
        self, rounds: Sequence[tuple[MtQuestion, int]], verdicts: Sequence[Verdict], model: str
    ) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        """Return the win rate over both orders; a verdict that flips is a tie, as upstream."""
        values, compared, flips, rows = [], [], 0, []
        for i, (question, turn) in enumerate(rounds):
            first, second = verdicts[2 * i], verdicts[2 * i + 1]
            winners = [
                {"A": "model_1", "B": "model_2", "C": "tie"}.get(str(first.value), "error"),
                {"A": "model_2", "B": "model_1", "C": "tie"}.get(str(second.value), "error"),
            ]
            rows.append(
                {
                    "question_id": question.id,
                    "model_1": model,
                    "model_2": "baseline",
                    "g1_winner": winners[0],
                    "g2_winner": winners[1],
                    "judge": [self.judge.model, self.prompts.origin],
                    "g1_judgment": first.text,
                    "g2_judgment": second.text,
                    "turn": turn,
                }
            )
            if "error" in winners:
                continue
            agreed = winners[0] == winners[1]
            flips += not agreed
            values.append({"model_1": 1.0, "model_2": 0.0}.get(winners[0], 0.5) if agreed else 0.5)
            compared.append(question)
        if not values:
            return {}, rows
        clusters, categories = [q.id for q in compared], [q.category for q in compared]
        found = interval_figures(values, clusters, categories)
        figures = {
            "win_rate": found["score"],
            "win_rate_stderr": found["stderr"],
            "win_rate_interval": found["interval"],
            "win_rate_groups": found["groups"],
            "order_flips": flips / len(values),
        }
        return figures, rows

    def _judgment(
        self, question: MtQuestion, turn: int, verdict: Verdict, answers: Answers, model: str
    ) -> dict[str, Any]:
        """Return a row of upstream's `model_judgment` files; -1 is no rating."""
        case = self._rating(question, turn, answers)
        return {
            "question_id": question.id,
            "model": model,
            "judge": [self.judge.model, case.prompt.name],
            "user_prompt": case.messages[-1]["content"],
            "judgment": verdict.text,
            "score": -1 if verdict.number is None else verdict.number,
            "turn": turn,
        }

    def _row(
        self,
        question: MtQuestion,
        answers: Answers,
        ratings: Sequence[tuple[tuple[MtQuestion, int], Verdict]],
    ) -> dict[str, Any]:
        own = [v for (q, _), v in ratings if q.id == question.id]
        return {
            "prompt": "\n\n".join(question.turns),
            "target": "\n\n".join(question.reference or ()),
            "output": "\n\n".join(answers[question.id]),
            "group": question.category,
            "ratings": [v.number for v in own],
            "verdict": "\n\n".join(v.text for v in own),
        }


def _unused_references(questions: Sequence[MtQuestion], references: str | None) -> str | None:
    """Return a warning of references that were given for questions judged without one."""
    if references is None:
        return None
    given = reference_ids(references)
    unused = [q for q in questions if q.id in given and not q.needs_reference]
    if not any(q.id in given for q in questions):
        return f"none of the {len(given)} references is of a question here"
    if not unused:
        return None
    categories = ", ".join(sorted({q.category for q in unused}))
    return (
        f"{len(unused)} references are not used, those of {categories}: judged against a "
        f"reference are {', '.join(sorted(REFERENCED))} and {ARENA_HARD} alone; name a category so"
    )


def _other_temperature(questions: Sequence[MtQuestion]) -> str | None:
    """Return a note of categories that upstream gives no temperature."""
    others = sorted({q.category for q in questions if q.kind not in TEMPERATURES})
    if not others:
        return None
    return f"{', '.join(others)}: upstream names no temperature, answers have {_OTHER_TEMPERATURE}"


def _rating_figures(
    known: Sequence[tuple[MtQuestion, int, float]], answers: Answers
) -> dict[str, Any]:
    """Return figures of (question, turn, rating), by category and turn; empty without any."""
    if not known:
        return {}
    values = [number / 10 for _, _, number in known]
    clusters = [question.id for question, _, _ in known]
    figures = interval_figures(values, clusters, [question.category for question, _, _ in known])
    turns = sorted({turn for _, turn, _ in known})
    lengths = [len(answers[question.id][turn - 1]) for question, turn, _ in known]
    return {
        **figures,
        "rating": 10 * figures["score"],
        "turns": {str(turn): fmean(n for _, of, n in known if of == turn) for turn in turns},
        "controls": {"length_only": {"correlation": spearman(lengths, values)}},
    }
