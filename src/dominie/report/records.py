"""What a report knows of a run: plain data, and the few questions every part of the page asks."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

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
    """

    score: float
    stderr: float | None = None
    n: int | None = None
    metric: str = ""
    groups: Mapping[str, Score] = field(default_factory=dict)
    extras: Mapping[str, float] = field(default_factory=dict)

    @property
    def half_width(self) -> float | None:
        """Half of the 95 % interval.

        With no failure (or no success) among n rows the normal interval has no width, which claims
        too much; the rule of three, 3/n, takes its place.
        """
        if self.n and not self.stderr and self.score in (0.0, 1.0):
            return min(1.0, 3.0 / self.n)
        return None if self.stderr is None else NORMAL_95 * self.stderr

    def overlaps(self, other: Score) -> bool | None:
        """Whether the two 95 % intervals meet; None where one of them is not known."""
        mine, theirs = self.half_width, other.half_width
        if mine is None or theirs is None:
            return None
        return abs(self.score - other.score) <= mine + theirs


@dataclass(frozen=True)
class Sample:
    """One row of a task as one model answered it."""

    prompt: str
    target: str
    output: str
    correct: bool
    group: str | None = None


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
    """

    name: str
    path: Path
    results: Mapping[str, Mapping[str, Score]]
    stages: Mapping[str, Stage]
    samples: Mapping[str, Mapping[str, tuple[Sample, ...]]]
    recipe: str | None
    notes: tuple[str, ...]

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

    def parent(self, model: str) -> str | None:
        """The evaluated model from which this one was trained, if both were evaluated."""
        stage = self.stages.get(model)
        student = stage.student if stage else None
        return student if student != model and student in self.results else None
