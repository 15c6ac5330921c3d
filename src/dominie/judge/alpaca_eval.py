"""AlpacaEval 1 and 2: how often a model's answer is preferred to a baseline's, in both orders."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from dominie.core.errors import InputError
from dominie.core.references import PathName
from dominie.data.json_files import lost_characters
from dominie.generation.thoughts import without_thoughts
from dominie.judge.annotations import Difficulty, Summary, read_difficulty, summarise
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
from dominie.judge.prompts import Prompt, preference_prompt
from dominie.judge.published_files import (
    by_unique,
    read_objects,
    read_text,
    text_field,
)

_FIELDS = ("instruction", "output_1", "output_2")


@dataclass(frozen=True)
class Instruction:
    """An instruction by its place in the evaluation set, and the baseline's answer and name."""

    id: int
    instruction: str
    output: str
    generator: str
    dataset: str


def read_baseline(path: str) -> list[Instruction]:
    """Return instructions with a baseline's answers: a file of outputs, or of annotations.

    Raises:
        InputError: the file is missing or malformed, or an instruction occurs twice.
    """
    placed = read_objects(Path(path), what="baseline outputs")
    ending = "_1" if "output_1" in placed[0][1] else ""
    found = [
        (
            where,
            Instruction(
                id=i,
                instruction=text_field(row, "instruction", where=where),
                output=text_field(row, f"output{ending}", where=where),
                generator=str(row.get(f"generator{ending}", "baseline")),
                dataset=str(row.get("dataset", "all")),
            ),
        )
        for i, (where, row) in enumerate(placed)
    ]
    return list(by_unique(found, lambda item: item.instruction, what="instruction").values())


def _prompt_of(path: str | None, version: Literal[1, 2]) -> Prompt:
    """Return upstream's prompt of a version, or the default one."""
    if path is None:
        return preference_prompt(weighted=version == 2)
    text = read_text(Path(path), what="the judge's prompt")
    found = Prompt(Path(path).stem, text, None, "identifier" if version == 2 else "ranking")
    if missing := [field for field in _FIELDS if field not in found.fields]:
        raise InputError(
            f"the prompt lacks {{{missing[0]}}}",
            where=path,
            expected=", ".join(f"{{{field}}}" for field in _FIELDS),
            do="use upstream's prompt file, or leave prompt out for the default one",
        )
    return found


_LETTERS = {"A": 1.0, "B": 2.0, "C": 1.5}


@dataclass(frozen=True, kw_only=True)
class AlpacaEval(BenchmarkSettings):
    """AlpacaEval in a recipe.

    Attributes:
        kind: tells it from other benchmarks.
        baseline: the baseline's outputs with their instructions, in upstream's shape: a file of
            outputs, or an annotation file, whose `output_1` is the baseline's.
        version: 1 asks for a preference, 2 weighs it by the odds of the judge's first token, if
            the endpoint gives log-probabilities.
        prompt: upstream's prompt file, `alpaca_eval.txt` for version 1, `alpaca_eval_clf.txt` for
            version 2; None takes our own prompts, and the result says so.
        difficulty: upstream's `df_gamed.csv`, for length control as upstream; None leaves the
            difficulty out, and the result says so.
        temperature: of the answers.
    """

    baseline: PathName
    kind: Literal["alpaca_eval"] = "alpaca_eval"
    version: Literal[1, 2] = 2
    prompt: PathName | None = None
    difficulty: PathName | None = None
    max_new_tokens: int = 2048
    temperature: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.temperature <= 2:
            raise ValueError(f"temperature is from 0 to 2, got {self.temperature}")

    def load(self) -> LoadedAlpacaEval:
        """Return the benchmark with its files read.

        Raises:
            InputError: a file is missing or malformed.
        """
        return LoadedAlpacaEval(self)


class LoadedAlpacaEval(Benchmark):
    """AlpacaEval with its files read."""

    def __init__(self, settings: AlpacaEval) -> None:
        self.settings = settings
        self.instructions = read_baseline(settings.baseline)[: settings.limit]
        if not settings.keep_thoughts:
            self.instructions = [
                dataclasses.replace(each, output=without_thoughts(each.output))
                for each in self.instructions
            ]
        self.prompt = _prompt_of(settings.prompt, settings.version)
        self.difficulty: Difficulty | None = None
        if settings.difficulty:
            self.difficulty = read_difficulty(Path(settings.difficulty))
        dialogues = [
            Dialogue(i.id, (i.instruction,), settings.temperature) for i in self.instructions
        ]
        baseline = {i.instruction: [i.output] for i in self.instructions}
        notes = [
            failed_answers(baseline, "baseline outputs"),
            lost_characters([i.instruction for i in self.instructions], "instructions"),
            lost_characters([i.output for i in self.instructions], "baseline outputs"),
        ]
        super().__init__(settings, dialogues, notes)

    def answer_row(self, dialogue: Dialogue, turns: Sequence[str], model: str) -> dict[str, Any]:
        """Return a row of upstream's `model_outputs.json`."""
        return {
            "dataset": self.instructions[int(dialogue.id)].dataset,
            "instruction": dialogue.turns[0],
            "output": turns[0],
            "generator": model,
        }

    def answers_in(self, row: Mapping[str, Any]) -> Sequence[str]:
        """Return the answer in such a row."""
        return [row["output"]]

    def cases(self, answers: Answers) -> list[Case]:
        """Return each instruction twice: the baseline's answer first, then the model's first."""
        return [
            self._case(instruction, *pair)
            for instruction in self._answered(answers)
            for own in [answers[instruction.id][0]]
            for pair in ((instruction.output, own), (own, instruction.output))
        ]

    def judged(self, answers: Answers, verdicts: Sequence[Verdict], model: str) -> Judged:
        """Return the win rate, plain and length-controlled, by data set."""
        instructions = self._answered(answers)
        orders = [
            (_preference(verdicts[2 * i]), _preference(verdicts[2 * i + 1], swapped=True))
            for i in range(len(instructions))
        ]
        rows = [
            self._annotation(instruction, answers[instruction.id][0], pair, model)
            for instruction, pair in zip(instructions, orders, strict=True)
        ]
        known = [(i, row["preference"] - 1.0) for i, row in enumerate(rows) if row["preference"]]
        figures: dict[str, Any] = {
            "metric": "alpaca_eval",
            "version": self.settings.version,
            "prompt": "upstream" if self.settings.prompt else "own",
            "baseline": instructions[0].generator,
        }
        if known:
            values, clusters = [value for _, value in known], [i for i, _ in known]
            groups = [instructions[i].dataset for i in clusters]
            figures |= interval_figures(values, clusters, groups)
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
            self.answer_row(dialogue, answers[dialogue.id], model)
            for dialogue in self.dialogues
            if dialogue.id in answers
        ]
        files = {"annotations.json": rows, "model_outputs.json": outputs}
        items = paired_items(
            [None if row["preference"] is None else row["preference"] - 1.0 for row in rows],
            [instruction.id for instruction in instructions],
        )
        return Judged(figures, scored, len(verdicts), shown, files, items)

    def _answered(self, answers: Answers) -> list[Instruction]:
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
        """Return a row of upstream's annotation files; without both verdicts, no preference."""
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


def _preference(verdict: Verdict, *, swapped: bool = False) -> float | None:
    """Return a preference from 1, for the answer shown first, to 2, for the other."""
    value = _LETTERS[verdict.value] if isinstance(verdict.value, str) else verdict.value
    return 3.0 - value if swapped and value is not None else value


def _figures(summary: Summary) -> dict[str, Any]:
    """Return figures as `results.json` holds them: fractions."""
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
