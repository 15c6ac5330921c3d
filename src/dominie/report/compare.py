"""Several runs side by side: models on two tasks, over seeds, and the Pareto front."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dominie.core.errors import InputError
from dominie.core.io import finite, mapping
from dominie.core.run_reader import read_object
from dominie.core.run_records import read_run
from dominie.core.task_result import JUDGED, Estimate, Interval, estimate, square_and_add
from dominie.report.scatter import pareto_front

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from dominie.core.run_records import Run
    from dominie.core.task_result import TaskResult


#: Notes about a run that concern what is compared.
_ON_FIGURES = re.compile(r"evaluated|(results|comparisons|scored)\.json")


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


@dataclass(frozen=True)
class _Scored:
    """A model of one run with its results on both tasks.

    Attributes:
        place: what runs are paired by: the seed, or the number of the run.
    """

    run: Run
    model: str
    place: str
    results: tuple[TaskResult, TaskResult]


def compare_runs(
    paths: Sequence[Path], *, across: str | None, upwards: str | None, against: str | None
) -> Comparison:
    """Average models over runs, and find the Pareto front.

    Intervals are over questions and, of several runs, over runs as well (`estimate`). Differences
    are paired: run by run of one seed. Alike runs are one; runs that asked a model other questions
    are not averaged.

    Args:
        paths: run folders.
        across: task on the horizontal axis; None is the first of the results.
        upwards: task on the vertical axis; None is the second.
        against: a model to take differences to.

    Raises:
        InputError: a folder is no run, or a task or model is in none of them.
    """
    notes: list[str] = []
    runs = _unlike([read_run(path) for path in paths], notes)
    notes += [f"{run.name}: {n}" for run in runs for n in run.notes if _ON_FIGURES.search(n)]
    tasks = _tasks(runs, across, upwards)
    named = _named(runs, tasks)
    grouped = _of_like_questions(named, tasks, notes)
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
    if against is not None and against not in named:
        raise InputError(
            "no such model to compare with",
            where="--against",
            found=against,
            expected=", ".join(named),
        )
    base = named.get(against, []) if against is not None else []
    plain = {name: _point(name, scores) for name, scores in grouped.items()}
    edge = pareto_front({name: (point.x.mean, point.y.mean) for name, point in plain.items()})
    points = [
        replace(
            point,
            on_front=name in edge,
            differences=_differences(grouped[name], base, tasks),
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
        told = "; ".join(n for run in runs for n in run.notes if _ON_FIGURES.search(n))
        raise InputError(
            "a scatter plot needs two tasks",
            where=", ".join(run.name for run in runs),
            found=", ".join(known) or told or "no results",
            do="run the recipe, or name two tasks with --x and --y",
        )
    return str(chosen[0]), str(chosen[1])


def _unlike(runs: Sequence[Run], notes: list[str]) -> list[Run]:
    """The runs without those that are another's again: its folder twice, or a copy of it.

    Of one recipe and one seed, they agree on all that both scored; two seeds may agree by chance.
    What one alone has scored is kept.
    """
    kept: list[Run] = []
    for run in runs:
        place = next((i for i, other in enumerate(kept) if _is_again(run, other)), None)
        if place is None:
            kept.append(run)
            continue
        twin = kept[place]
        notes.append(f"{run.name} counts once with {twin.name}: the same results, recipe and seed.")
        models = dict.fromkeys((*twin.results, *run.results))
        both = {m: {**run.results.get(m, {}), **twin.results.get(m, {})} for m in models}
        kept[place] = replace(twin, results=both)
    return kept


def _is_again(run: Run, other: Run) -> bool:
    if run.path.resolve() == other.path.resolve():
        return True
    shared = [
        (result, other.results[model][task])
        for model, by_task in run.results.items()
        for task, result in by_task.items()
        if task in other.results.get(model, {})
    ]
    return bool(shared) and all(a == b for a, b in shared) and _made_of(run) == _made_of(other)


def _made_of(run: Run) -> tuple[object, ...]:
    recipe = re.sub(r"^name:.*\n?", "", run.recipe or "", flags=re.M)
    record = read_object(run.path / "sweep.json", [])
    return record.get("seed"), record.get("values"), recipe


def _named(runs: Sequence[Run], tasks: tuple[str, str]) -> dict[str, list[_Scored]]:
    """Scores by model and the values of its run, in the order of their first appearance.

    Runs of one recipe that differ in nothing but the seed are siblings, over which models are
    averaged. Models of several recipes are named with their run, unless they are the same in all.
    """
    records = [read_object(run.path / "sweep.json", []) for run in runs]
    values = [{k: str(v) for k, v in mapping(r.get("values")).items()} for r in records]
    several = _of_several_recipes(runs, records)
    found: dict[str, list[_Scored]] = {}
    for number, (run, record, own) in enumerate(zip(runs, records, values, strict=True)):
        differing = ", ".join(
            f"{key.rpartition('.')[2]} {value}"
            for key, value in own.items()
            if any(other.get(key) != value for other in values)
        )
        seed = finite(record.get("seed"))
        for model, scores in run.results.items():
            if not all(task in scores for task in tasks):
                continue
            name = f"{model} ({differing})" if differing else model
            if run in several:
                if any(
                    _place(other, model, tasks) != _place(run, model, tasks) for other in several
                ):
                    name = f"{model} ({run.name})"
                elif name in found:
                    continue
            known = found.setdefault(name, [])
            place = f"run {number}" if seed is None else f"seed {seed:g}"
            if any(scored.place == place for scored in known):
                place = f"run {number}"
            known.append(_Scored(run, model, place, (scores[tasks[0]], scores[tasks[1]])))
    return found


def _of_like_questions(
    named: Mapping[str, Sequence[_Scored]], tasks: tuple[str, str], notes: list[str]
) -> dict[str, list[_Scored]]:
    """Scores with runs set apart, and noted, that asked a model other questions than its others."""
    found: dict[str, list[_Scored]] = {}
    for name, members in named.items():
        groups: list[list[_Scored]] = []
        for each in members:
            alike = (group for group in groups if _asked_alike(group[0], each, tasks))
            group = next(alike, None)
            if group is None:
                groups.append(group := [])
            group.append(each)
        if len(groups) == 1:
            found[name] = groups[0]
            continue
        for group in groups:
            found[f"{name} ({', '.join(scored.run.name for scored in group)})"] = group
        firsts = " and ".join(group[0].run.name for group in groups)
        notes.append(f"{name}: {firsts} asked other questions; they are not averaged.")
    return found


def _asked_alike(one: _Scored, other: _Scored, tasks: tuple[str, str]) -> bool:
    """Whether nothing that was kept of two runs tells that they asked other questions."""
    for task, mine, theirs in zip(tasks, one.results, other.results, strict=True):
        # A judge may leave other questions unscored.
        if mine.metric not in JUDGED and None not in (mine.n, theirs.n) and mine.n != theirs.n:
            return False
        rows = [s.run.samples.get(task, {}).get(s.model, ()) for s in (one, other)]
        asked = [[(sample.prompt, sample.target) for sample in samples] for samples in rows]
        if all(asked) and asked[0] != asked[1]:
            return False
    return True


def _of_several_recipes(runs: Sequence[Run], records: Sequence[Mapping[str, Any]]) -> list[Run]:
    """The runs that no sweep made, if their recipes differ in more than name and seed."""
    alone = [run for run, record in zip(runs, records, strict=True) if not record]
    recipes = {re.sub(r"^\s*(name|seed):.*\n", "", run.recipe or "", flags=re.M) for run in alone}
    return alone if len(recipes) > 1 else []


def _place(run: Run, model: str, tasks: tuple[str, str]) -> tuple[float, ...]:
    """The scores of a model, none if it is not in the run."""
    scores = run.results.get(model, {})
    return tuple(scores[task].score for task in tasks if task in scores)


def _point(name: str, members: Sequence[_Scored]) -> Point:
    x, y = (
        estimate(
            [scored.results[axis].score for scored in members],
            [scored.results[axis].interval95 for scored in members],
        )
        for axis in (0, 1)
    )
    return Point(name, x, y, len(members))


def _differences(
    mine: Sequence[_Scored], base: Sequence[_Scored], tasks: tuple[str, str]
) -> tuple[Estimate, Estimate] | None:
    """Paired differences over the runs that have both models; None of a model to itself."""
    pairs = [
        (one, other)
        for one in mine
        for other in base
        if one.run is other.run or (one.place == other.place and _asked_alike(one, other, tasks))
    ]
    if not pairs or all(one is other for one, other in pairs):
        return None
    x, y = (
        estimate(
            [a.results[axis].score - b.results[axis].score for a, b in pairs],
            [_difference(a, b, axis, task) for a, b in pairs],
        )
        for axis, task in enumerate(tasks)
    )
    return x, y


def _difference(one: _Scored, other: _Scored, axis: int, task: str) -> Interval | None:
    """The difference of two models on questions: in pairs where that is kept, else of two."""
    if one.run is other.run:
        kept = one.run.difference(task, one.model, other.model)
        if kept is not None:
            return kept
    mine, theirs = one.results[axis].interval95, other.results[axis].interval95
    return None if mine is None or theirs is None else square_and_add(mine, theirs)


def front(points: Sequence[Point]) -> list[Point]:
    """The Pareto front, from left to right."""
    return sorted((point for point in points if point.on_front), key=lambda point: point.x.mean)
