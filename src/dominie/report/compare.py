"""Several runs side by side: models on two tasks, over seeds, and the Pareto front."""

from __future__ import annotations

import math
import re
import statistics
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dominie.core.errors import InputError
from dominie.core.io import finite, mapping
from dominie.core.run_reader import read_object
from dominie.core.run_records import read_run
from dominie.core.task_result import Interval
from dominie.report.formatting import DASH, percent, signed_points

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from dominie.core.run_records import Run
    from dominie.core.task_result import TaskResult


def pareto_front(places: Mapping[str, tuple[float, float]]) -> list[str]:
    """The names on the front, from left to right.

    Args:
        places: two scores of each name, both better when higher. Names in one place share it.
    """
    kept = [
        name
        for name, place in places.items()
        if not any(_beats(other, place) for other in places.values())
    ]
    return sorted(kept, key=lambda name: (places[name][0], -places[name][1]))


def _beats(one: tuple[float, float], other: tuple[float, float]) -> bool:
    """Whether one is at least as good on both scores and better on one."""
    return one[0] >= other[0] and one[1] >= other[1] and one != other


#: Two-sided 95 % quantiles of Student's t, by degrees of freedom from 1; 1.96 beyond.
_STUDENT_95 = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160,
    2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056,
    2.052, 2.048, 2.045, 2.042,
)  # fmt: skip


@dataclass(frozen=True)
class Estimate:
    """A mean, and its 95 % interval if one is known."""

    mean: float
    interval: Interval | None = None

    @property
    def ends(self) -> tuple[float, float] | None:
        """The ends of the interval."""
        return None if self.interval is None else self.interval.ends

    @property
    def half(self) -> float | None:
        """Half of the interval's width."""
        return None if self.interval is None else (self.interval.high - self.interval.low) / 2

    @property
    def significant(self) -> bool:
        """Whether the interval of a difference excludes zero."""
        return self.interval is not None and not self.interval.within_noise


@dataclass(frozen=True)
class Point:
    """A model's scores on two tasks.

    Attributes:
        name: of the model, with the values it ran under if runs differ in them.
        x: its score on the task across.
        y: its score on the task upwards.
        runs: how many runs it stands for.
        on_front: whether no other model is at least as good on both tasks and better on one.
        differences: x and y minus those of the model compared with, in the runs that have both.
    """

    name: str
    x: Estimate
    y: Estimate
    runs: int
    on_front: bool = False
    differences: tuple[Estimate, Estimate] | None = None


@dataclass(frozen=True)
class Comparison:
    """The models of several runs on two tasks.

    Attributes:
        tasks: the task across and the task upwards.
        points: the models, in the order of the results.
        against: the model that differences are to, None if none was asked for.
        notes: what could not be read or was left out.
    """

    tasks: tuple[str, str]
    points: Sequence[Point]
    against: str | None
    notes: Sequence[str]


#: Results of one model on both tasks, by the run's seed, or its number.
_Pairs = dict[str, "tuple[TaskResult, TaskResult]"]


def compare_runs(
    paths: Sequence[Path], *, across: str | None, upwards: str | None, against: str | None
) -> Comparison:
    """Average models over runs, and find the Pareto front.

    The interval of several runs is Student's, over runs; that of one run is over its questions.
    Differences are paired: run by run of one seed.

    Args:
        paths: run folders.
        across: task on the horizontal axis; None is the first of the results.
        upwards: task on the vertical axis; None is the second.
        against: a model to take differences to.

    Raises:
        InputError: a folder is no run, or a task or model is in none of them.
    """
    runs = [read_run(path) for path in paths]
    notes = [f"{run.name}: {note}" for run in runs for note in run.notes if "evaluated" in note]
    tasks = _tasks(runs, across, upwards)
    grouped = _grouped(runs, tasks)
    if not grouped:
        raise InputError(
            "no model of these runs was scored on both tasks",
            where=", ".join(str(path) for path in paths),
            expected=" and ".join(tasks),
        )
    notes += [
        f"{run.name}: left out, none of its models was scored on both {tasks[0]} and {tasks[1]}."
        for run in runs
        if run.results and not any(set(tasks) <= set(scores) for scores in run.results.values())
    ]
    if against is not None and against not in grouped:
        raise InputError(
            "no such model to compare with",
            where="--against",
            found=against,
            expected=", ".join(grouped),
        )
    plain = {name: _point(name, scores) for name, scores in grouped.items()}
    edge = pareto_front({name: (point.x.mean, point.y.mean) for name, point in plain.items()})
    points = [
        replace(
            point,
            on_front=name in edge,
            differences=None
            if against in (None, name)
            else _differences(grouped[name], grouped[str(against)]),
        )
        for name, point in plain.items()
    ]
    return Comparison(tasks, points, against, notes)


def _tasks(runs: Sequence[Run], across: str | None, upwards: str | None) -> tuple[str, str]:
    known = list(dict.fromkeys(task for run in runs for task in run.tasks))
    able = list(dict.fromkeys(task for run in runs for task in run.ability_tasks))
    for asked in (across, upwards):
        if asked is not None and asked not in known:
            raise InputError(
                "no such task in these runs",
                where="--x, --y",
                found=asked,
                expected=", ".join(known),
            )
    left = [task for task in able if task not in (across, upwards)]
    chosen = [
        task if task is not None else (left.pop(0) if left else None) for task in (across, upwards)
    ]
    if None in chosen or chosen[0] == chosen[1]:
        raise InputError(
            "a scatter plot needs two tasks",
            where=", ".join(run.name for run in runs),
            found=", ".join(known) or "no results",
            do="run the recipe, or name two tasks with --x and --y",
        )
    return str(chosen[0]), str(chosen[1])


def _grouped(runs: Sequence[Run], tasks: tuple[str, str]) -> dict[str, _Pairs]:
    """Scores by model and the values of its run, in the order of their first appearance.

    Runs of one recipe that differ in nothing but the seed are siblings, over which models are
    averaged. Models of several recipes are named with their run, unless they are the same in all.
    """
    records = [read_object(run.path / "sweep.json", []) for run in runs]
    values = [{k: str(v) for k, v in mapping(r.get("values")).items()} for r in records]
    several = _of_several_recipes(runs, records)
    grouped: dict[str, _Pairs] = {}
    for number, (run, record, own) in enumerate(zip(runs, records, values, strict=True)):
        differing = ", ".join(
            f"{key.rpartition('.')[2]} {value}"
            for key, value in own.items()
            if any(other.get(key) != value for other in values)
        )
        seed = finite(record.get("seed"))
        place = f"seed {seed:g}" if seed is not None else f"run {number}"
        for model, scores in run.results.items():
            if not all(task in scores for task in tasks):
                continue
            name = f"{model} ({differing})" if differing else model
            if run in several:
                if any(
                    _place(other, model, tasks) != _place(run, model, tasks) for other in several
                ):
                    name = f"{model} ({run.name})"
                elif name in grouped:
                    continue
            pairs = grouped.setdefault(name, {})
            key = place if place not in pairs else f"run {number}"
            pairs[key] = (scores[tasks[0]], scores[tasks[1]])
    return grouped


def _of_several_recipes(runs: Sequence[Run], records: Sequence[Mapping[str, Any]]) -> list[Run]:
    """The runs that no sweep made, if their recipes differ in more than name and seed."""
    alone = [run for run, record in zip(runs, records, strict=True) if not record]
    recipes = {re.sub(r"^\s*(name|seed):.*\n", "", run.recipe or "", flags=re.M) for run in alone}
    return alone if len(recipes) > 1 else []


def _place(run: Run, model: str, tasks: tuple[str, str]) -> tuple[float, ...]:
    """The scores of a model, none if it is not in the run."""
    scores = run.results.get(model, {})
    return tuple(scores[task].score for task in tasks if task in scores)


def _point(name: str, by_run: _Pairs) -> Point:
    pairs = list(by_run.values())
    x, y = (
        Estimate(pairs[0][axis].score, pairs[0][axis].interval95)
        if len(pairs) == 1
        else estimate([pair[axis].score for pair in pairs])
        for axis in (0, 1)
    )
    return Point(name, x, y, len(pairs))


def _differences(mine: _Pairs, theirs: _Pairs) -> tuple[Estimate, Estimate] | None:
    """Paired differences over the runs that have both models."""
    shared = [run for run in mine if run in theirs]
    if not shared:
        return None
    x, y = (
        estimate([mine[run][axis].score - theirs[run][axis].score for run in shared])
        for axis in (0, 1)
    )
    return x, y


def estimate(values: Sequence[float]) -> Estimate:
    """The mean of independent values with Student's 95 % interval; none for a single value."""
    mean = statistics.fmean(values)
    if len(values) < 2:
        return Estimate(mean)
    freedom = len(values) - 1
    quantile = _STUDENT_95[freedom - 1] if freedom <= len(_STUDENT_95) else 1.96
    half = quantile * statistics.stdev(values) / math.sqrt(len(values))
    return Estimate(mean, Interval(mean, mean - half, mean + half))


def front(points: Sequence[Point]) -> list[Point]:
    """The Pareto front, from left to right."""
    return sorted((point for point in points if point.on_front), key=lambda point: point.x.mean)


def comparison_headings(comparison: Comparison) -> list[str]:
    """The headings of a comparison's table."""
    scores = [f"{task} %" for task in comparison.tasks]
    differences = [f"Δ {task}" for task in comparison.tasks] if comparison.against else []
    return [*scores, *differences, "runs"]


def comparison_rows(comparison: Comparison) -> list[tuple[Point, list[str]]]:
    """Points with their cells, best on the second task first."""
    rows = []
    for point in sorted(comparison.points, key=lambda point: -point.y.mean):
        cells = [_score(point.x), _score(point.y)]
        if comparison.against:
            cells += [_difference(each) for each in point.differences or (None, None)]
        rows.append((point, [*cells, str(point.runs)]))
    return rows


def comparison_note(comparison: Comparison) -> str:
    """What the figures of a comparison's table are."""
    note = "± 95 % interval"
    if comparison.against is None:
        return note
    return f"{note} · Δ to {comparison.against}, in points, run by run; *: the interval excludes 0"


def _score(found: Estimate) -> str:
    return percent(found.mean) + ("" if found.half is None else f" ±{percent(found.half)}")


def _difference(found: Estimate | None) -> str:
    if found is None:
        return DASH
    half = "" if found.half is None else f" ±{percent(found.half)}"
    return f"{signed_points(found.mean)}{half}{'*' if found.significant else ''}"
