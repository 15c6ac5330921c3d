"""A run as plain data, and which folders are runs."""

from __future__ import annotations

import difflib
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from dominie.core.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

#: What a run writes and a recipe's folder has not.
_TRACES = (".lock", "results.json", "*/stage.json", "*/metrics.jsonl")


def is_run(path: Path) -> bool:
    """Whether a folder is a run's, be it under way; that of a recipe is none."""
    return any(True for trace in _TRACES for _ in path.glob(trace))


def runs_in(runs: Path) -> list[str]:
    """The names of the runs in their folder."""
    return sorted(path.name for path in runs.glob("*") if path.is_dir() and is_run(path))


def found_run(word: Path, runs: Path) -> Path:
    """The run that is meant by its folder, or by its name in the folder of all runs.

    Where neither is a run, a folder of this name is returned, for its reader to tell what it lacks.

    Raises:
        InputError: there is no such folder, or it holds a recipe that has not been run.
    """
    there = [path for path in (word, runs / word) if path.is_dir()]
    run = next((path for path in there if is_run(path)), None)
    if run is not None:
        return run
    if not there:
        raise no_such_run(str(word), word, runs)
    if (there[0] / "recipe.yaml").is_file():
        raise InputError(
            "this is a recipe's folder, and not a run",
            where=str(there[0]),
            expected="a folder that `dominie run` made, runs/NAME, or its NAME",
            do=f"`dominie run {there[0]}` makes a run of it",
        )
    return there[0]


def no_such_run(word: str, place: Path, runs: Path) -> InputError:
    """What to say of a run that is not there.

    Args:
        word: as it was typed.
        place: the folder it names.
        runs: the folder of all runs.
    """
    there = runs_in(runs)
    near = difflib.get_close_matches(place.name, there, n=1, cutoff=0.5)
    return InputError(
        "there is no such run folder",
        where=word,
        expected=f"a folder, or one of {', '.join(there)} in {runs}" if there else "a run's folder",
        found=f"nothing at {place} or {runs / place}",
        do=f"did you mean {runs / near[0]}?" if near else "name one as runs/NAME",
    )


RATED = "mt_bench"
"""The metric of ratings from 1 to 10, kept as tenths."""
JUDGED = (RATED, "alpaca_eval")
"""Metrics that a judge decides."""

NORMAL_95 = 1.959964
"""Half-width, in standard errors, of a 95 % interval of the normal distribution."""


@dataclass(frozen=True)
class Score:
    """One figure of one model on one task.

    Args:
        score: from 0 to 1.
        stderr: its standard error, None where not known.
        n: the number of rows it was measured on, None where not known.
        metric: what was measured, `exact_match` say.
        groups: the same by family of rows.
        extras: further figures of the task, `kl` (nats per token) or `agreement` say.
        interval: where it lies with 95 % confidence, None where not known.
        measure: what was measured, in words.
        controls: what answers of no worth score with the same judge, by their name.
        warnings: what a person should know before believing it.
    """

    score: float
    stderr: float | None = None
    n: int | None = None
    metric: str = ""
    groups: Mapping[str, Score] = field(default_factory=dict)
    extras: Mapping[str, float] = field(default_factory=dict)
    interval: tuple[float, float] | None = None
    measure: str = ""
    controls: Mapping[str, float] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()

    @property
    def ends(self) -> tuple[float, float] | None:
        """The ends of the 95 % interval: as measured, else of the normal distribution.

        With no failure (or no success) among n rows the normal interval has no width, which claims
        too much; the rule of three, 3/n, takes its place.
        """
        if self.interval is not None:
            return self.interval
        if self.n and not self.stderr and self.score in (0.0, 1.0):
            unseen = min(1.0, 3.0 / self.n)
            return (0.0, unseen) if self.score == 0 else (1.0 - unseen, 1.0)
        if self.stderr is None:
            return None
        half = NORMAL_95 * self.stderr
        return self.score - half, self.score + half

    def overlaps(self, other: Score) -> bool | None:
        """Whether the two 95 % intervals meet; None where one of them is not known."""
        mine, theirs = self.ends, other.ends
        if mine is None or theirs is None:
            return None
        return mine[0] <= theirs[1] and theirs[0] <= mine[1]


@dataclass(frozen=True)
class Difference:
    """How much higher one model scored than another on the same questions, with its interval."""

    value: float
    low: float
    high: float

    @property
    def within_noise(self) -> bool:
        """Whether the interval of the difference holds 0."""
        return self.low <= 0.0 <= self.high

    def __neg__(self) -> Difference:
        return Difference(-self.value, -self.high, -self.low)


@dataclass(frozen=True)
class Sample:
    """One row of a task as one model answered it.

    Args:
        score: what the answer was worth, from 0 to 1; None where there is no verdict on it.
        verdict: what a judge wrote about it.
        invalid: whether the answer was of another form than was asked for.
    """

    prompt: str
    target: str
    output: str
    score: float | None
    group: str | None = None
    verdict: str | None = None
    invalid: bool = False


@dataclass(frozen=True)
class TrainLine:
    """What training logged at one step: means per supervised token, in nats."""

    step: float
    values: Mapping[str, float]
    terms: Mapping[str, float]
    sources: Mapping[str, Mapping[str, float]]


@dataclass(frozen=True)
class EvaluationLine:
    """What evaluation while training measured at one step, by source."""

    step: float
    sources: Mapping[str, Mapping[str, float]]


@dataclass(frozen=True)
class Stage:
    """One stage: what `stage.json` says of it, and its `metrics.jsonl`."""

    name: str
    status: str = "unfinished"
    kind: str = "train"
    student: str | None = None
    teachers: Mapping[str, str | None] = field(default_factory=dict)
    steps: float | None = None
    supervised_tokens: float | None = None
    seconds: float | None = None
    parameters: float | None = None
    trainable_parameters: float | None = None
    data: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    train: tuple[TrainLine, ...] = ()
    evaluations: tuple[EvaluationLine, ...] = ()

    @property
    def done(self) -> bool:
        """Whether the stage ran to its end."""
        return self.status == "done"

    @property
    def teacher_names(self) -> tuple[str, ...]:
        """The teachers, each once, in the order of the sources."""
        return tuple(dict.fromkeys(name for name in self.teachers.values() if name))


@dataclass(frozen=True)
class Run:
    """A run folder.

    Args:
        results: model → task → score, in the order of `results.json`.
        stages: by name, students after the stages that made them.
        samples: task → model → the rows of its evaluation.
        notes: what was missing or could not be read, as sentences for people.
        differences: task → (model, other) → how they differ on the same questions.
        baseline: the model that the others are compared with.
    """

    name: str
    path: Path
    results: Mapping[str, Mapping[str, Score]]
    stages: Mapping[str, Stage]
    samples: Mapping[str, Mapping[str, tuple[Sample, ...]]]
    recipe: str | None
    notes: tuple[str, ...]
    differences: Mapping[str, Mapping[tuple[str, str], Difference]] = field(default_factory=dict)
    baseline: str | None = None

    @property
    def tasks(self) -> tuple[str, ...]:
        """Every task that some model was measured on, in the order of `results.json`."""
        return tuple(dict.fromkeys(task for scores in self.results.values() for task in scores))

    @property
    def ability_tasks(self) -> tuple[str, ...]:
        """The tasks that measure what a model can do, not how like another model it is."""
        return tuple(task for task in self.tasks if self.metric(task) != "agreement")

    def metric(self, task: str) -> str:
        """The metric of a task, empty where no result names it."""
        named = (scores[task].metric for scores in self.results.values() if task in scores)
        return next((metric for metric in named if metric), "")

    def measure(self, task: str) -> str:
        """What a task measured, in words: as the results say, else the metric's name."""
        named = (scores[task].measure for scores in self.results.values() if task in scores)
        words = {RATED: "rating", "alpaca_eval": "win rate"}
        metric = self.metric(task)
        told = next((measure for measure in named if measure), "")
        return told or words.get(metric, metric.replace("_", " "))

    @property
    def judged_tasks(self) -> tuple[str, ...]:
        """The tasks whose answers a judge rated."""
        return tuple(task for task in self.tasks if self.metric(task) in JUDGED)

    def difference(self, task: str, model: str, other: str) -> Difference | None:
        """By how much a model differs from another on the same questions, where that is known."""
        known = self.differences.get(task, {})
        if (model, other) in known:
            return known[model, other]
        return -known[other, model] if (other, model) in known else None

    def within_noise(self, task: str, model: str, other: str) -> bool | None:
        """Whether two scores cannot be told apart.

        Differences on the same questions decide where they are known, else whether the intervals
        overlap, which errs on the side of claiming too little. None where neither is known.
        """
        difference = self.difference(task, model, other)
        if difference is not None:
            return difference.within_noise
        return self.results[model][task].overlaps(self.results[other][task])

    def parent(self, model: str) -> str | None:
        """The evaluated model from which this one was trained, if both were evaluated."""
        stage = self.stages.get(model)
        student = stage.student if stage else None
        return student if student != model and student in self.results else None
