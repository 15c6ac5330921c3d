"""Scores of judged benchmarks: MT-Bench and AlpacaEval, for a recipe's models or from a file."""

from __future__ import annotations

import contextlib
import functools
import json
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from dominie.core.display import Display
from dominie.core.errors import DominieError, InputError, RunError
from dominie.core.io import write_atomic, write_json
from dominie.generation.calls import Calls
from dominie.generation.endpoint import Endpoint
from dominie.generation.generator import EndpointGenerator, Generator
from dominie.generation.reply_log import ReplyLog
from dominie.judge.annotations import read_annotations, read_difficulty, summarise
from dominie.judge.benchmark import Answers, AnswersFile, Benchmark, Judged
from dominie.judge.judge import (
    CALL_FAILED,
    CUT_OFF,
    constant_controls,
    control_warnings,
    enough_scored,
    judged_answers,
    model_families,
    same_family_warning,
)
from dominie.recipe import Evaluation
from dominie.stages.run_folder import RunFolder


class JudgedScores:
    """Scores every model of a recipe on its benchmarks, by a judge of their answers.

    Answers and replies are kept in `evaluation/` and never asked for again; what could not be
    scored is asked for again every time.

    Args:
        local: returns the generator of a model in this process, by the recipe's name for it.
    """

    def __init__(
        self,
        folder: RunFolder,
        evaluation: Evaluation,
        local: Callable[[str], Generator],
        display: Display,
    ) -> None:
        self.folder, self.evaluation = folder, evaluation
        self._local, self.display = local, display
        self._path = folder.path / "evaluation"
        self._benchmarks = {name: b.load() for name, b in evaluation.benchmarks.items()}
        for name, loaded in self._benchmarks.items():
            for note in loaded.notes:
                display.once(f"warning: {name}: {note}")
        self._calls = functools.cache(self._judge_calls)
        self._controls = functools.cache(self._judged_controls)
        self._refused: list[str] = []
        self._unanswered: list[str] = []
        self._errors: list[DominieError] = []

    def scores(self, name: str) -> dict[str, Any]:
        """Return the results of a model or endpoint on all benchmarks; without those refused."""
        found = {benchmark: self._result(name, benchmark) for benchmark in self._benchmarks}
        return {benchmark: result for benchmark, result in found.items() if result is not None}

    def check_headlines(self) -> None:
        """Refuse to end as if all results were there.

        Raises:
            DominieError: that which kept a model from answering; or fewer than 95 % of a model's
                answers were obtained, or of the verdicts on it could be read.
        """
        if self._errors:
            raise self._errors[0]
        if self._unanswered:
            raise RunError(
                "too few questions were answered for a figure",
                where=f"{self._path}",
                expected="at least 95 % of them",
                found="; ".join(self._unanswered),
                do="run again, which asks the missing ones alone; take a question that stays "
                "refused out of the benchmark's file",
            )
        if not self._refused:
            return
        why = " ".join(self._refused)
        raise RunError(
            "too few verdicts for a figure: calls to the judge failed"
            if CALL_FAILED in why
            else "too few verdicts could be read for a figure",
            where=f"{self._path}",
            expected="at least 95 % of those asked for",
            found="; ".join(self._refused),
            do="run again when the judge answers, which asks for the missing ones alone"
            if CALL_FAILED in why
            else "raise max_tokens of the judge, thoughts included, and run again"
            if CUT_OFF in why
            else "run again, which asks for the missing ones alone, or choose another judge; "
            "every reply is kept",
        )

    def _result(self, name: str, benchmark: str) -> dict[str, Any] | None:
        loaded, title = self._benchmarks[benchmark], f"{name} on {benchmark}"
        file = AnswersFile(
            self._path / name / benchmark / "answers.jsonl",
            loaded,
            name,
            keep_thoughts=loaded.keep_thoughts,
        )
        answers = self._answers(name, benchmark, file)
        if answers is None:
            return None
        if not enough_scored(len(answers), len(loaded.dialogues)):
            found = f"{title}: {_unanswered_questions(loaded, file.unanswered)}"
            self._unanswered.append(found)
            self.display.line(f"{found}; no figure")
            return None
        shares = _answer_shares(answers, file.stops, file.unanswered)
        with self.display.progress(f"{title}, judged") as advance:
            judged = judged_answers(
                loaded,
                answers,
                self._calls(benchmark),
                advance,
                model=name,
                unanswered=file.unanswered,
            )
        self._write(self._path / name, benchmark, judged)
        if "score" not in judged.figures:
            missing = judged.figures.get("unscored_because", {})
            why = "; ".join(f"{reason}: {count}" for reason, count in missing.items())
            if CALL_FAILED in missing:
                why += f"; the last call that failed: {self._calls(benchmark).last_failure}"
            found = f"{judged.scored} of {judged.total} ({why})"
            self._refused.append(f"{title}: {found}")
            self.display.line(f"{title}: no figure, {found} scored")
            return None
        figures = judged.figures | shares
        figures["controls"] = {**self._controls(benchmark), **figures.get("controls", {})}
        family = same_family_warning(loaded.judge.model, self._lineage(name))
        amiss = _answer_warnings(loaded, file, shares)
        figures["warnings"] = [*amiss, *([family] if family else []), *control_warnings(figures)]
        self.display.done(title, _summary(figures))
        for warning in figures["warnings"]:
            self.display.line(f"  warning: {warning}")
        figures["warnings"] += loaded.notes  # shown before anything was judged
        return figures

    def _answers(self, name: str, benchmark: str, file: AnswersFile) -> Answers | None:
        """Return a model's answers; None after an error, which is kept: others go on."""
        calls: Calls | None = None
        model = self.evaluation.scored[name]
        served = self.folder.recipe.served.get(model)
        if (endpoint := self.evaluation.endpoints.get(name, served)) is not None:
            where = f"models.{model}" if served else f"evaluate.endpoints.{name}"
            calls = self._calls_to(endpoint, self._path / name / "replies.jsonl", where)
            generator: Generator = EndpointGenerator(calls)
        else:
            generator = self._local(self.evaluation.models[name])
        try:
            with self.display.progress(f"{name} answers {benchmark}") as advance:
                return file.complete(generator, advance)
        except DominieError as error:
            if calls is None or calls.interrupted:
                raise
            self._errors.append(error)
            self.display.line(f"{name} on {benchmark}: no figure, {error}")
            return None

    def _judge_calls(self, benchmark: str) -> Calls:
        judge, log = self._benchmarks[benchmark].judge, self.folder.replies(benchmark)
        return self._calls_to(judge, log, f"evaluate.benchmarks.{benchmark}.judge")

    def _calls_to(self, endpoint: Endpoint, log: Path, where: str) -> Calls:
        return Calls(endpoint, ReplyLog(log), where=where, show=self.display.line)

    def _judged_controls(self, benchmark: str) -> dict[str, Any]:
        with self.display.progress(f"controls of {benchmark}") as advance:
            return constant_controls(self._benchmarks[benchmark], self._calls(benchmark), advance)

    def _lineage(self, name: str) -> list[str]:
        """Return what a model is, started from and was taught by."""
        if name in self.evaluation.endpoints:
            return [self.evaluation.endpoints[name].model]
        recipe, names = self.folder.recipe, list[str]()
        waiting, seen = [self.evaluation.models[name]], set()
        while waiting:
            model = waiting.pop()
            if model in seen:
                continue
            seen.add(model)
            if model in recipe.stages:
                waiting += recipe.stages[model].models
            elif model in recipe.served:
                names += [recipe.served[model].model, model]
            else:
                path = recipe.model(model).path
                names += [Path(path).name if Path(path).exists() else path, model]
                if not any(model_families(name) for name in names[-2:]):
                    # The name does not tell the family; the architecture may.
                    with contextlib.suppress(InputError):
                        names.append(f"{model}, built as {self.folder.info(model).family},")
        return names

    def _write(self, path: Path, benchmark: str, judged: Judged) -> None:
        _write_lines(path / f"{benchmark}.jsonl", judged.rows)
        write_json(path / f"{benchmark}.json", {"items": judged.items.as_dict()}, indent=None)
        for name, rows in judged.files.items():
            if name.endswith(".jsonl"):
                _write_lines(path / benchmark / name, rows)
            else:
                text = json.dumps(rows, indent=1, ensure_ascii=False)
                write_atomic(path / benchmark / name, text)


def _answer_shares(
    answers: Answers, stops: Mapping[int | str, Sequence[str]], unanswered: Collection[int | str]
) -> dict[str, float]:
    """Return which share of answers is cut off or empty, and of questions is unanswered, if any."""
    turns = [text for texts in answers.values() for text in texts]
    ends = [stop for question in answers for stop in stops[question]]
    found = {
        "cut": ends.count("length") / max(1, len(turns)),
        "empty": sum(not text.strip() for text in turns) / max(1, len(turns)),
        "unanswered": len(unanswered) / max(1, len(answers) + len(unanswered)),
    }
    return {name: share for name, share in found.items() if share}


def _answer_warnings(
    benchmark: Benchmark, file: AnswersFile, shares: Mapping[str, float]
) -> list[str]:
    """Return what is amiss with a model's answers, before anything about their scores."""
    found = []
    if "cut" in shares:
        found.append(
            f"{100 * shares['cut']:.0f} % of answers were cut off, by {benchmark.max_new_tokens} "
            "tokens or the model's context, and are judged as they are: raise max_new_tokens"
        )
    if "empty" in shares:
        thoughts = "" if benchmark.keep_thoughts else " once their thoughts are left out"
        found.append(f"{100 * shares['empty']:.0f} % of answers are empty{thoughts}")
    if file.unanswered:
        found.append(
            f"{_unanswered_questions(benchmark, file.unanswered)}; asked again the next time"
        )
    return found


def _unanswered_questions(benchmark: Benchmark, unanswered: Mapping[int | str, str]) -> str:
    """Return how many questions were not answered, the first of them, and why."""
    first = next(d for d in benchmark.dialogues if d.id in unanswered)
    return (
        f"{len(unanswered)} of {len(benchmark.dialogues)} questions were not answered, first "
        f"{first.turns[0][:60]!r} ({unanswered[first.id]})"
    )


def annotated_win_rates(path: Path, difficulty: Path | None, display: Display) -> dict[str, Any]:
    """Return win rates of an AlpacaEval annotation file, in percent, and show them.

    Args:
        path: annotations as upstream publishes them, a JSON array.
        difficulty: upstream's `df_gamed.csv` or `instruction_difficulty.csv`.
    """
    rows = read_annotations(path)
    known = None if difficulty is None else read_difficulty(difficulty)
    summary = summarise(rows, known, where=str(path))
    found = summary.percent()
    names = {"model": "generator_2", "baseline": "generator_1", "annotator": "annotator"}
    found |= {name: rows[0].get(key) for name, key in names.items()}
    display.line(f"{found['model'] or path.name} against {found['baseline'] or 'the baseline'}")
    display.line(
        f"  win rate           {found['win_rate']:.2f} % ± {found['standard_error']:.2f} "
        f"(n = {found['n']}; {found['n_wins']} won, {found['n_wins_base']} lost, "
        f"{found['n_draws']} drawn; {found['n_excluded']} without a preference)"
    )
    if summary.controlled is not None:
        display.line(
            f"  at equal length    {found['length_controlled_win_rate']:.2f} % "
            f"± {found['length_controlled_standard_error']:.2f} ({summary.control})"
        )
    else:
        display.line(f"  at equal length    {summary.control}")
    for note in summary.notes:
        display.line(f"  warning: {note}")
    if summary.longer is not None:
        display.line(
            f"  the longer answer won {found['longer_answer_wins']:.1f} % of decided pairs"
        )
    return found


def _summary(figures: Mapping[str, Any]) -> str:
    """Return a result in one line."""
    low, high = (100 * end for end in figures["interval"])
    if "rating" in figures:
        line = f"{figures['rating']:.2f} of 10 ({low / 10:.2f} to {high / 10:.2f})"
    else:
        line = f"{100 * figures['score']:.1f} % ({low:.1f} to {high:.1f})"
    if "length_controlled_win_rate" in figures:
        rate = 100 * figures["length_controlled_win_rate"]
        line += f", at equal length {rate:.1f} % ({figures['length_control']})"
    elif "length_control" in figures:
        line += ", none at equal length"
    elif "win_rate" in figures:
        line += f", wins {100 * figures['win_rate']:.1f} % against the baseline"
    controls = [
        f"{name} {100 * found['score']:.0f} %"
        for name, found in figures["controls"].items()
        if "score" in found
    ]
    return f"{line}; controls: {', '.join(controls) or 'none'}; {figures['unscored']} unscored"


def _write_lines(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    write_atomic(path, text)
