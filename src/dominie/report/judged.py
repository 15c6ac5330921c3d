"""What a judge made of the models: ratings by category, win rates, and the controls beside them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from dominie.report.bars import Bar, BarGroup, bar_chart
from dominie.report.charts import swatch
from dominie.report.curves import Key
from dominie.report.formats import percent, rating, shortened
from dominie.report.radar import Spokes, radar_chart
from dominie.report.records import RATED

if TYPE_CHECKING:
    from collections.abc import Mapping

    from markupsafe import Markup

    from dominie.report.records import Run, Score

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
    categories = list(dict.fromkeys(name for score in scores.values() for name in score.groups))
    drawn = _drawn(scores, chosen) if rated else []
    spokes = [
        Spokes(
            model,
            {name: group.score for name, group in scores[model].groups.items()},
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


def _bars(score: Score, rated: bool) -> tuple[Bar, ...]:
    bars = [Bar(score.score, _written(score.score, rated), score.ends)]
    if _CONTROLLED in score.extras:
        value = score.extras[_CONTROLLED]
        bars.append(Bar(value, _written(value, rated), style="second"))
    return tuple(bars)


def _controls(scores: Mapping[str, Score]) -> dict[str, float]:
    """Controls are the same for all models of a task; the first that names one counts."""
    found: dict[str, float] = {}
    for score in scores.values():
        for name, value in score.controls.items():
            found.setdefault(name, value)
    return found


def _drawn(scores: Mapping[str, Score], chosen: str | None) -> list[str]:
    """As many models as can be told apart on a radar: the one in the headline, then the best."""
    ranked = sorted(scores, key=lambda model: (model != chosen, -scores[model].score))
    kept = set(ranked[:_MOST_POLYGONS])
    return [model for model in scores if model in kept]


def _written(value: float, rated: bool) -> str:
    return rating(value) if rated else percent(value)
