"""AlpacaEval 1 and 2: how often a model's answer is preferred to a baseline's, in both orders."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Literal

from dominie.core.references import PathName
from dominie.generation.endpoint import STRICT
from dominie.generation.generator import Dialogue
from dominie.judge.annotations import Difficulty, Summary, read_difficulty, summarise
from dominie.judge.benchmark import (
    Answers,
    Judged,
    grouped_figures,
    interval_figures,
    paired_items,
    spread_out,
)
from dominie.judge.judge import Case, Judge, Verdict
from dominie.judge.published_files import Instruction, preference_prompt_of, read_baseline

_LETTERS = {"A": 1.0, "B": 2.0, "C": 1.5}


@dataclass(frozen=True, kw_only=True)
class AlpacaEval:
    """AlpacaEval in a recipe.

    Attributes:
        kind: tells it from other benchmarks.
        baseline: the baseline's outputs with their instructions, in upstream's shape: a file of
            outputs, or an annotation file, whose `output_1` is the baseline's.
        judge: who compares.
        version: 1 asks for a preference, 2 weighs it by the odds of the judge's first token, where
            the endpoint gives log-probabilities.
        prompt: upstream's prompt file, `alpaca_eval.txt` for version 1, `alpaca_eval_clf.txt` for
            version 2; None judges by our own words, and says so.
        difficulty: upstream's `df_gamed.csv`, for length control as upstream; None leaves the
            difficulty out, and says so.
        limit: the first instructions only.
        max_new_tokens: longest answer.
        temperature: of the answers.
        control_questions: how many instructions the controls are judged on.
        seed: of sampled answers.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT
    baseline: PathName
    judge: Judge
    kind: Literal["alpaca_eval"] = "alpaca_eval"
    version: Literal[1, 2] = 2
    prompt: PathName | None = None
    difficulty: PathName | None = None
    limit: int | None = None
    max_new_tokens: int = 2048
    temperature: float = 0.0
    control_questions: int = 40
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("limit", "max_new_tokens", "control_questions"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if not 0 <= self.temperature <= 2:
            raise ValueError(f"temperature is from 0 to 2, got {self.temperature}")


class AlpacaEvalExam:
    """AlpacaEval, its files read.

    Args:
        settings: of the recipe.

    Raises:
        InputError: a file is missing or malformed.
    """

    def __init__(self, settings: AlpacaEval) -> None:
        self.settings, self.judge = settings, settings.judge
        self.max_new_tokens, self.seed = settings.max_new_tokens, settings.seed
        self.instructions: Sequence[Instruction] = read_baseline(settings.baseline)[
            : settings.limit
        ]
        self.prompt = preference_prompt_of(settings.prompt, settings.version)
        self.difficulty: Difficulty | None = None
        if settings.difficulty:
            self.difficulty = read_difficulty(Path(settings.difficulty))

    @cached_property
    def dialogues(self) -> Sequence[Dialogue]:
        """All instructions."""
        return [
            Dialogue(i.id, (i.instruction,), self.settings.temperature) for i in self.instructions
        ]

    @property
    def sample(self) -> Sequence[Dialogue]:
        """Instructions of all data sets."""
        return spread_out(self.dialogues, self.settings.control_questions)

    def line(self, dialogue: Dialogue, turns: Sequence[str], model: str) -> dict[str, Any]:
        """A row of upstream's `model_outputs.json`."""
        return {
            "dataset": self.instructions[int(dialogue.id)].dataset,
            "instruction": dialogue.turns[0],
            "output": turns[0],
            "generator": model,
        }

    def turns(self, line: Mapping[str, Any]) -> Sequence[str]:
        """The answer in such a row."""
        return [line["output"]]

    def cases(self, answers: Answers) -> list[Case]:
        """Each instruction twice: the baseline's answer first, then the model's first."""
        return [
            self._case(instruction, *pair)
            for instruction in self._asked(answers)
            for own in [answers[instruction.id][0]]
            for pair in ((instruction.output, own), (own, instruction.output))
        ]

    def judged(self, answers: Answers, verdicts: Sequence[Verdict], model: str) -> Judged:
        """Win rate, plain and length-controlled, by data set."""
        asked = self._asked(answers)
        orders = [
            (_preference(verdicts[2 * i]), _swapped(_preference(verdicts[2 * i + 1])))
            for i in range(len(asked))
        ]
        rows = [
            self._annotation(instruction, answers[instruction.id][0], pair, model)
            for instruction, pair in zip(asked, orders, strict=True)
        ]
        known = [(i, row["preference"] - 1.0) for i, row in enumerate(rows) if row["preference"]]
        figures: dict[str, Any] = {
            "metric": "alpaca_eval",
            "version": self.settings.version,
            "prompt": "upstream" if self.settings.prompt else "own",
            "baseline": asked[0].generator,
        }
        if known:
            values, clusters = [value for _, value in known], [i for i, _ in known]
            figures |= interval_figures(values, clusters)
            groups = [asked[i].dataset for i in clusters]
            figures["groups"] = grouped_figures(values, clusters, groups)
            figures |= _figures(summarise(rows, self.difficulty, where=self.settings.baseline))
            longer = sum(len(row["output_2"]) > len(row["output_1"]) for row in rows) / len(rows)
            figures["controls"]["length_only"]["longer"] = longer
            flipped = [(a > 1.5) != (b > 1.5) for a, b in orders if a and b and 1.5 not in (a, b)]
            figures["order_flips"] = sum(flipped) / len(flipped) if flipped else 0.0
        shown = [
            {
                "prompt": row["instruction"],
                "target": row["output_1"],
                "output": row["output_2"],
                "group": row["dataset"],
                "preference": row["preference"],
                "verdict": f"{verdicts[2 * i].text}\n\n{verdicts[2 * i + 1].text}",
            }
            for i, row in enumerate(rows)
        ]
        scored = sum(v.value is not None for v in verdicts)
        outputs = [
            self.line(dialogue, answers[dialogue.id], model)
            for dialogue in self.dialogues
            if dialogue.id in answers
        ]
        files = {"annotations.json": rows, "model_outputs.json": outputs}
        items = paired_items(
            [None if row["preference"] is None else row["preference"] - 1.0 for row in rows],
            [instruction.id for instruction in asked],
        )
        return Judged(figures, scored, len(verdicts), shown, files, items)

    def _asked(self, answers: Answers) -> list[Instruction]:
        return [instruction for instruction in self.instructions if instruction.id in answers]

    def _case(self, instruction: Instruction, first: str, second: str) -> Case:
        messages = self.prompt.messages(
            {"instruction": instruction.instruction}, {"output_1": first, "output_2": second}
        )
        return Case(self.prompt, messages, (first, second))

    def _annotation(
        self,
        instruction: Instruction,
        output: str,
        orders: tuple[float | None, float | None],
        model: str,
    ) -> dict[str, Any]:
        """A row of upstream's annotation files; without a verdict in both orders it has none."""
        first, second = orders
        mean = None if first is None or second is None else (first + second) / 2
        return {
            "dataset": instruction.dataset,
            "instruction": instruction.instruction,
            "output_1": instruction.output,
            "generator_1": instruction.generator,
            "output_2": output,
            "generator_2": model,
            "annotator": self.judge.model,
            "preference": mean,
            "preference_by_order": list(orders),
            "index": instruction.id,
        }


def _preference(verdict: Verdict) -> float | None:
    """From 1 for what was shown first to 2 for what was shown second."""
    if isinstance(verdict.value, str):
        return _LETTERS[verdict.value]
    return verdict.value


def _swapped(preference: float | None) -> float | None:
    return None if preference is None else 3.0 - preference


def _figures(summary: Summary) -> dict[str, Any]:
    """As `results.json` holds them: fractions."""
    found: dict[str, Any] = {
        "win_rate": summary.wins.win_rate,
        "win_rate_stderr": summary.wins.standard_error,
        "discrete_win_rate": summary.wins.discrete_win_rate,
        "excluded": summary.wins.excluded,
        "length_control": summary.control,
        "length": summary.length,
        "controls": {"length_only": {"longer_answer_wins": summary.longer}},
    }
    if summary.controlled is not None:
        found["length_controlled_win_rate"] = summary.controlled.win_rate
        found["length_controlled_stderr"] = summary.controlled.standard_error
    return found
