"""Sections of a report: what a judge found, and answers side by side where models differ."""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from dominie.core.results import RATED
from dominie.report.bars import Bar, BarGroup, Spokes, bar_chart, radar_chart
from dominie.report.charts import swatch
from dominie.report.curves import Key
from dominie.report.formatting import count, percent, rating, shortened

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from markupsafe import Markup

    from dominie.core.results import TaskResult
    from dominie.core.run_reader import Sample
    from dominie.core.run_records import Run

_MOST_POLYGONS = 6
_CONTROLLED = "length_controlled_win_rate"
_TENTHS = tuple((value / 10, str(value)) for value in (0, 2, 4, 6, 8, 10))
_PERCENT = tuple((value / 100, f"{value} %") for value in (0, 25, 50, 75, 100))


@dataclass(frozen=True)
class JudgedTask:
    """The drawings of one judged task.

    Args:
        bars: the models' scores with their intervals, controls below them.
        controlled: whether a second bar of each model gives the win rate at equal length.
        radar: ratings by category, where there are three or more.
        keys: the legend of the radar.
        left_out: models that the radar has no room for.
        warnings: what a person should know before believing the figures, by model.
    """

    task: str
    rated: bool
    bars: Markup
    controlled: bool
    radar: Markup | None
    keys: tuple[Key, ...]
    left_out: int
    warnings: tuple[tuple[str, str], ...]


def judged_tasks(run: Run, chosen: str | None) -> list[JudgedTask]:
    """The drawings of every task that a judge decided."""
    return [_judged(run, task, chosen) for task in run.judged_tasks]


def _judged(run: Run, task: str, chosen: str | None) -> JudgedTask:
    scores = {model: by_task[task] for model, by_task in run.results.items() if task in by_task}
    rated = run.metric(task) == RATED
    groups = [
        BarGroup(model, _bars(score, rated), "chosen" if model == chosen else "")
        for model, score in scores.items()
    ]
    groups += [
        BarGroup(f"control: {name}", (Bar(value, _written(value, rated)),), "control")
        for name, value in _controls(scores).items()
    ]
    ticks = _TENTHS if rated else _PERCENT
    bars = bar_chart(f"{run.measure(task)} in {task}", groups, ticks=ticks, half=not rated)
    categories = list(dict.fromkeys(name for score in scores.values() for name in score.by))
    drawn = _drawn(scores, chosen) if rated else []
    spokes = [
        Spokes(
            model,
            {name: group.score for name, group in scores[model].by.items()},
            f"c{index}",
            chosen=model == chosen,
        )
        for index, model in enumerate(drawn)
    ]
    radar = radar_chart(f"{task} by category", categories, spokes)
    keys = [
        Key(swatch(each.style), shortened(each.label, 24), rating(scores[each.label].score))
        for each in spokes
    ]
    return JudgedTask(
        task,
        rated,
        bars,
        any(_CONTROLLED in score.extras for score in scores.values()),
        radar,
        tuple(keys) if radar else (),
        len(scores) - len(drawn) if radar else 0,
        tuple((model, told) for model, score in scores.items() for told in score.warnings),
    )


def _bars(score: TaskResult, rated: bool) -> tuple[Bar, ...]:
    bars = [Bar(score.score, _written(score.score, rated), score.ends)]
    if _CONTROLLED in score.extras:
        value = score.extras[_CONTROLLED]
        bars.append(Bar(value, _written(value, rated), style="second"))
    return tuple(bars)


def _controls(scores: Mapping[str, TaskResult]) -> dict[str, float]:
    """Controls are the same for all models of a task; the first that names one counts."""
    found: dict[str, float] = {}
    for score in scores.values():
        for name, value in score.controls.items():
            found.setdefault(name, value)
    return found


def _drawn(scores: Mapping[str, TaskResult], chosen: str | None) -> list[str]:
    """As many models as can be told apart on a radar: the one in the headline, then the best."""
    ranked = sorted(scores, key=lambda model: (model != chosen, -scores[model].score))
    kept = set(ranked[:_MOST_POLYGONS])
    return [model for model in scores if model in kept]


def _written(value: float, rated: bool) -> str:
    return rating(value) if rated else percent(value)


@dataclass(frozen=True)
class Answer:
    """What one model said."""

    model: str
    output: str
    score: float | None
    verdict: str | None = None
    invalid: bool = False


@dataclass(frozen=True)
class Comparison:
    """One prompt, what was asked for, and what every model said."""

    prompt: str
    target: str
    group: str | None
    answers: tuple[Answer, ...]

    @property
    def differs(self) -> bool:
        """Whether the answers are not all worth the same."""
        return len({answer.score for answer in self.answers}) > 1


@dataclass(frozen=True)
class Selection:
    """Comparisons to show, out of how many there were and how many of those differ."""

    shown: tuple[Comparison, ...]
    differing: int
    total: int


def selection(by_model: Mapping[str, Sequence[Sample]], most: int, length: int) -> Selection:
    """The prompts that tell the models apart best, spread over the families of the task.

    A prompt ranks by how far apart what the answers are worth lies: of answers right or wrong, by
    how evenly it splits the models. No model's successes are preferred to another's. Equal ranks
    keep the order of the task.

    Args:
        by_model: the rows of each model.
        most: how many prompts to show.
        length: how many characters of a text to show.
    """
    every = _comparisons(by_model)
    differing = [comparison for comparison in every if comparison.differs]
    families: dict[str | None, list[Comparison]] = defaultdict(list)
    for comparison in sorted(differing or every, key=_spread, reverse=True):
        families[comparison.group].append(comparison)
    chosen: list[Comparison] = []
    rank = 0
    while len(chosen) < most and any(rank < len(family) for family in families.values()):
        chosen += [family[rank] for family in families.values() if rank < len(family)]
        rank += 1
    shown = tuple(_cut(comparison, length) for comparison in chosen[:most])
    return Selection(shown, len(differing), len(every))


def _comparisons(by_model: Mapping[str, Sequence[Sample]]) -> list[Comparison]:
    """Rows joined by prompt and target; a prompt that stands twice is joined in its order."""
    joined: dict[tuple[str, str, int], list[tuple[str, Sample]]] = {}
    for model, rows in by_model.items():
        seen: dict[tuple[str, str], int] = defaultdict(int)
        for row in rows:
            key = (row.prompt, row.target)
            joined.setdefault((*key, seen[key]), []).append((model, row))
            seen[key] += 1
    return [
        Comparison(
            prompt,
            target,
            next((row.group for _, row in rows if row.group), None),
            tuple(
                Answer(model, row.output, row.score, row.verdict, row.invalid)
                for model, row in rows
            ),
        )
        for (prompt, target, _), rows in joined.items()
    ]


def _spread(comparison: Comparison) -> float:
    """Σ of squared differences between all pairs, up to a constant: n · Σ x² - (Σ x)²."""
    worth = [answer.score for answer in comparison.answers if answer.score is not None]
    spread = len(worth) * math.fsum(x * x for x in worth) - math.fsum(worth) ** 2
    return round(spread, 9)


def _cut(comparison: Comparison, length: int) -> Comparison:
    return Comparison(
        _shown(comparison.prompt, length),
        _shown(comparison.target, length),
        comparison.group,
        tuple(
            replace(
                answer,
                output=_shown(answer.output, length),
                verdict=answer.verdict and _shown(answer.verdict, length),
            )
            for answer in comparison.answers
        ),
    )


def _shown(text: str, length: int) -> str:
    if len(text) <= length:
        return text
    return f"{text[:length]}… [{count(len(text) - length)} more characters]"
