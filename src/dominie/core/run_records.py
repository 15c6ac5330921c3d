"""A run as plain data, read tolerantly from its folder."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from dominie.core.errors import InputError
from dominie.core.io import finite, mapping, numbers, numbers_by_name, sequence, text
from dominie.core.results_file import read_comparisons, read_results
from dominie.core.run_reader import (
    Sample,
    read_metrics,
    read_recipe,
    read_samples,
    read_stage,
)
from dominie.core.task_result import JUDGED, LIKENESS, RATED, Interval, TaskResult, within_noise

if TYPE_CHECKING:
    from collections.abc import Mapping


@dataclass(frozen=True)
class TrainLine:
    """What training logged at one step: means per supervised token, in nats."""

    step: float
    values: Mapping[str, float]
    terms: Mapping[str, float]
    sources: Mapping[str, Mapping[str, float]]


@dataclass(frozen=True)
class EvaluationLine:
    """What validation measured at one step of the training, by source."""

    step: float
    sources: Mapping[str, Mapping[str, float]]


@dataclass(frozen=True)
class Stage:
    """One stage of any kind: its `stage.json`, its `metrics.jsonl` and the data it made.

    Attributes:
        kind: as `stage.json` has it: `train`, `merge`, or any other.
        description: one line that describes what the stage does, empty if there is none.
        stopped: why it ended before its last step, empty if it did not.
        models: that it was made from, if it has no student.
        teachers: by source.
        data: counts by source.
        made: of a stage that makes data: the size in bytes of each file of its folder `data/`.
    """

    name: str
    status: str = "unfinished"
    kind: str = "train"
    description: str = ""
    stopped: str = ""
    student: str | None = None
    models: tuple[str, ...] = ()
    teachers: Mapping[str, str | None] = field(default_factory=dict)
    steps: float | None = None
    supervised_tokens: float | None = None
    seconds: float | None = None
    parameters: float | None = None
    trainable_parameters: float | None = None
    data: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    made: Mapping[str, int] = field(default_factory=dict)
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

    @property
    def needs(self) -> tuple[str, ...]:
        """The models and stages it was made from."""
        return tuple(filter(None, (self.student, *self.models, *self.teacher_names, *self.data)))


@dataclass(frozen=True)
class Run:
    """A run folder.

    Attributes:
        results: model → task → result, in the order of `results.json`.
        stages: by name, students after the stages that made them.
        samples: task → model → the rows of its evaluation.
        notes: what was missing or could not be read, as sentences for people.
        differences: task → (model, other) → the difference on the same questions.
        baseline: the model that the others are compared with.
    """

    name: str
    path: Path
    results: Mapping[str, Mapping[str, TaskResult]]
    stages: Mapping[str, Stage]
    samples: Mapping[str, Mapping[str, tuple[Sample, ...]]]
    recipe: str | None
    notes: tuple[str, ...]
    differences: Mapping[str, Mapping[tuple[str, str], Interval]] = field(default_factory=dict)
    baseline: str | None = None

    @property
    def tasks(self) -> tuple[str, ...]:
        """Every task that some model was measured on, in the order of `results.json`."""
        return tuple(dict.fromkeys(task for results in self.results.values() for task in results))

    @property
    def ability_tasks(self) -> tuple[str, ...]:
        """The tasks that measure what a model can do, not how like another model it is."""
        return tuple(task for task in self.tasks if self.metric(task) not in LIKENESS)

    @property
    def judged_tasks(self) -> tuple[str, ...]:
        """The tasks whose answers a judge rated."""
        return tuple(task for task in self.tasks if self.metric(task) in JUDGED)

    def metric(self, task: str) -> str:
        """The metric of a task, empty if no result names it."""
        named = (results[task].metric for results in self.results.values() if task in results)
        return next(filter(None, named), "")

    def rated(self, task: str) -> bool:
        """Whether the scores of a task are ratings from 1 to 10."""
        return self.metric(task) == RATED

    def measure(self, task: str) -> str:
        """What a task measured, in words: as the results have it, else the metric's name."""
        named = (results[task].measure for results in self.results.values() if task in results)
        metric = self.metric(task)
        words = {RATED: "rating", "alpaca_eval": "win rate"}
        return next(filter(None, named), words.get(metric, metric.replace("_", " ")))

    def difference(self, task: str, model: str, other: str) -> Interval | None:
        """By how much a model differs from another on the same questions, if that is known."""
        known = self.differences.get(task, {})
        if (model, other) in known:
            return known[model, other]
        return -known[other, model] if (other, model) in known else None

    def within_noise(self, task: str, model: str, other: str) -> bool | None:
        """Whether the difference of two models is noise; None if no interval is known."""
        one, two = self.results[model][task], self.results[other][task]
        return within_noise(one, two, self.difference(task, model, other))

    def parent(self, model: str) -> str | None:
        """The evaluated model from which this one was trained, if both were evaluated."""
        stage = self.stages.get(model)
        student = stage.student if stage else None
        return student if student != model and student in self.results else None


def read_run(path: Path) -> Run:
    """Read a run folder: whatever can be read is read, whatever cannot becomes a note.

    Raises:
        InputError: the folder is missing, or holds nothing that a run writes.
    """
    path = Path(path)
    if not path.is_dir():
        raise InputError(
            "there is no such run folder",
            where=str(path),
            expected="a folder that `dominie run` made, runs/NAME",
            do="look in runs/, or run the recipe first",
        )
    notes: list[str] = []
    results = _results(path, notes)
    stages = _in_dependency_order(_stages(path, notes), list(results))
    recipe = read_recipe(path / "recipe.yaml", notes)
    if not results and not stages and recipe is None:
        raise InputError(
            "this folder is not a run",
            where=str(path),
            expected="recipe.yaml, results.json, or folders of stages",
            do="name the folder of one run, runs/NAME",
        )
    samples = _samples(path / "evaluation", results, notes)
    baseline, differences = read_comparisons(path, notes)
    return Run(
        path.resolve().name,
        path,
        results,
        stages,
        samples,
        recipe,
        tuple(notes),
        {
            task: {(a, b): d for (a, b), d in found.items() if {a, b} <= results.keys()}
            for task, found in differences.items()
        },
        baseline if baseline in results else None,
    )


def _results(run: Path, notes: list[str]) -> dict[str, dict[str, TaskResult]]:
    if not (run / "results.json").is_file():
        notes.append("Nothing has been evaluated yet: there is no results.json.")
    found: dict[str, dict[str, TaskResult]] = {}
    for model, tasks in read_results(run, notes).items():
        if not tasks:
            notes.append(f"results.json holds no score of {model}.")
        for task, entry in tasks.items():
            if (result := TaskResult.from_dict(entry)) is None:
                notes.append(f"results.json holds no finite score of {model} on {task}.")
            else:
                found.setdefault(model, {})[task] = result
    return found


def _stages(run: Path, notes: list[str]) -> dict[str, Stage]:
    """Every folder with a `stage.json` or a `metrics.jsonl`, by its name."""
    folders = sorted(child for child in run.iterdir() if child.is_dir())
    return {
        folder.name: _stage(folder, notes)
        for folder in folders
        if folder.name != "evaluation"
        and not folder.name.startswith(".")  # half made, or set aside
        and any((folder / name).is_file() for name in ("stage.json", "metrics.jsonl"))
    }


def _stage(folder: Path, notes: list[str]) -> Stage:
    record = read_stage(folder, notes)
    if record.get("status") != "done":
        notes.append(f"Stage {folder.name} has not finished; what it logged so far is shown.")
    train, evaluations = _metrics(folder, notes)
    so_far = train[-1].values if train else {}
    kind = text(record.get("kind")) or "train"
    models = tuple(filter(None, map(text, sequence(record.get("models")))))
    of_models = f"{kind} of {' and '.join(models)}" if models else ""
    return Stage(
        name=folder.name,
        status=text(record.get("status")) or "unfinished",
        kind=kind,
        description=text(record.get("description")) or of_models,
        stopped=text(mapping(record.get("stopped")).get("why")) or "",
        student=text(record.get("student")),
        models=models,
        teachers={
            source: text(teacher) for source, teacher in mapping(record.get("teachers")).items()
        },
        steps=finite(record.get("steps", so_far.get("step"))),
        supervised_tokens=finite(record.get("supervised_tokens", so_far.get("tokens"))),
        seconds=finite(record.get("seconds", so_far.get("seconds"))),
        parameters=finite(record.get("parameters")),
        trainable_parameters=finite(record.get("trainable_parameters")),
        data=numbers_by_name(record.get("data")),
        made={
            file.name: file.stat().st_size
            for file in sorted((folder / "data").glob("*"))
            if file.is_file() and not file.name.startswith(".")
        },
        versions={
            package: str(version) for package, version in mapping(record.get("versions")).items()
        },
        train=train,
        evaluations=evaluations,
    )


def _metrics(
    folder: Path, notes: list[str]
) -> tuple[tuple[TrainLine, ...], tuple[EvaluationLine, ...]]:
    """The two kinds of line of a `metrics.jsonl`, by step.

    A stage that was interrupted and resumed logs some steps twice; the later line is the one whose
    weights were kept.
    """
    train: dict[float, TrainLine] = {}
    evaluations: dict[float, EvaluationLine] = {}
    for line in read_metrics(folder, notes):
        step = finite(line.get("step"))
        if step is None:
            continue
        if "evaluation" in line:
            evaluations[step] = EvaluationLine(step, numbers_by_name(line["evaluation"]))
        else:
            by_source = numbers_by_name(line.get("sources"))
            train[step] = TrainLine(step, numbers(line), numbers(line.get("terms")), by_source)
    unfit = sum(not math.isfinite(line.values.get("loss", 0.0)) for line in train.values())
    if unfit:
        notes.append(
            f"The loss of stage {folder.name} was not finite at {unfit:,} logged "
            f"step{'s' if unfit > 1 else ''}; the curve has a gap there."
        )
    return (
        tuple(train[step] for step in sorted(train)),
        tuple(evaluations[step] for step in sorted(evaluations)),
    )


def _samples(
    folder: Path, results: Mapping[str, Mapping[str, TaskResult]], notes: list[str]
) -> dict[str, dict[str, tuple[Sample, ...]]]:
    samples: dict[str, dict[str, tuple[Sample, ...]]] = {}
    for model, tasks in results.items():
        for task in tasks:
            if rows := read_samples(folder / model / f"{task}.jsonl", notes):
                samples.setdefault(task, {})[model] = rows
    return samples


def _in_dependency_order(stages: dict[str, Stage], models: list[str]) -> dict[str, Stage]:
    """Stages after those that they need, otherwise in the order of the results."""
    ordered: dict[str, Stage] = {}

    def add(name: str, above: frozenset[str]) -> None:
        if name in ordered or name in above or name not in stages:
            return
        for needed in stages[name].needs:
            add(needed, above | {name})
        ordered[name] = stages[name]

    for name in (*models, *stages):
        add(name, frozenset())
    return ordered
