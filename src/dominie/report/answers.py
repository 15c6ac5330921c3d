"""The answers of models in a report: what a judge found, and answers side by side."""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from dominie.report.charts import Bar, BarGroup, bar_chart, element, picture, swatch
from dominie.report.curves import Key
from dominie.report.formatting import count, rating, score_text, shortened

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from markupsafe import Markup

    from dominie.core.run_reader import Sample
    from dominie.core.run_records import Run
    from dominie.core.task_result import TaskResult

_MOST_POLYGONS = 6
_CONTROLLED = "length_controlled_win_rate"
_TENTHS = tuple((value / 10, str(value)) for value in (0, 2, 4, 6, 8, 10))
_PERCENT = tuple((value / 100, f"{value} %") for value in (0, 25, 50, 75, 100))
_WIDTH, _HEIGHT, _REACH = 440.0, 360.0, 128.0
_RINGS = (0.2, 0.4, 0.6, 0.8, 1.0)
_LEAST = 3  # categories of which a polygon can be made


@dataclass(frozen=True)
class JudgedTask:
    """The drawings of one judged task.

    Attributes:
        bars: the models' scores with their intervals, controls below them.
        controlled: whether a second bar of each model gives the win rate at equal length.
        radar: ratings by category, if there are three or more.
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
    results = {model: by_task[task] for model, by_task in run.results.items() if task in by_task}
    rated = run.rated(task)
    groups = [
        BarGroup(model, _bars(result, rated), "chosen" if model == chosen else "")
        for model, result in results.items()
    ]
    controls: dict[str, float] = {}
    for result in results.values():  # alike for all models: the first that names one counts
        controls = controls | {k: v for k, v in result.controls.items() if k not in controls}
    groups += [
        BarGroup(f"control: {name}", (Bar(value, score_text(value, rated=rated)),), "control")
        for name, value in controls.items()
    ]
    ticks = _TENTHS if rated else _PERCENT
    bars = bar_chart(f"{run.measure(task)} in {task}", groups, ticks=ticks, half=not rated)
    categories = list(dict.fromkeys(name for result in results.values() for name in result.by))
    drawn = _drawn(results, chosen) if rated else []
    spokes = [
        Spokes(
            model,
            {name: group.score for name, group in results[model].by.items()},
            f"c{index}",
            chosen=model == chosen,
        )
        for index, model in enumerate(drawn)
    ]
    radar = radar_chart(f"{task} by category", categories, spokes)
    keys = [
        Key(swatch(each.style), shortened(each.label, 24), rating(results[each.label].score))
        for each in spokes
    ]
    return JudgedTask(
        task,
        rated,
        bars,
        any(_CONTROLLED in result.extras for result in results.values()),
        radar,
        tuple(keys) if radar else (),
        len(results) - len(drawn) if radar else 0,
        tuple((model, warning) for model, r in results.items() for warning in r.warnings),
    )


def _bars(result: TaskResult, rated: bool) -> tuple[Bar, ...]:
    bars = [Bar(result.score, score_text(result.score, rated=rated), result.ends)]
    if _CONTROLLED in result.extras:
        value = result.extras[_CONTROLLED]
        bars.append(Bar(value, score_text(value, rated=rated), style="second"))
    return tuple(bars)


def _drawn(results: Mapping[str, TaskResult], chosen: str | None) -> list[str]:
    """As many models as a radar has room for: the one in the headline, then the best."""
    ranked = sorted(results, key=lambda model: (model != chosen, -results[model].score))
    kept = set(ranked[:_MOST_POLYGONS])
    return [model for model in results if model in kept]


@dataclass(frozen=True)
class Spokes:
    """A model's scores from 0 to 1 by category, and the style it is drawn in."""

    label: str
    values: Mapping[str, float]
    style: str
    chosen: bool = False


def radar_chart(title: str, categories: Sequence[str], models: Sequence[Spokes]) -> Markup | None:
    """Models as polygons over categories; None if there are fewer than three.

    A model that lacks a category has a gap there: its line stops on both sides.
    """
    if len(categories) < _LEAST or not models:
        return None
    description = "; ".join(
        f"{model.label}: "
        + ", ".join(f"{name} {rating(value)}" for name, value in model.values.items())
        for model in models
    )
    return picture(
        _WIDTH,
        _HEIGHT,
        title,
        description,
        *_web(categories),
        *(shape for model in models for shape in _polygon(model, categories)),
        *_labels(len(categories)),
        style="radar",
    )


def _web(categories: Sequence[str]) -> Iterable[Markup]:
    count = len(categories)
    for ring in _RINGS:
        corners = " ".join(_corner(_place(i, count, ring)) for i in range(count))
        yield element("polygon", points=corners, class_="ring")
    for i, category in enumerate(categories):
        (x0, y0), (x1, y1) = _place(i, count, 0.0), _place(i, count, 1.0)
        yield element("line", x1=x0, y1=y0, x2=x1, y2=y1, class_="grid")
        x, y = _place(i, count, 1.12)
        lean = math.cos(_angle(i, count))
        anchor = "middle" if abs(lean) < 0.2 else "start" if lean > 0 else "end"
        drop = 4.0 + 5.0 * math.sin(_angle(i, count))
        name = shortened(category, 22)
        yield element("text", name, x=x, y=y + drop, text_anchor=anchor, class_="spoke")


def _labels(count: int) -> Iterable[Markup]:
    """The rings' values, between two spokes, where few lines cross."""
    for ring in _RINGS:
        far = _REACH * ring * math.cos(math.pi / count)
        angle = _angle(0, count) + math.pi / count
        x, y = _WIDTH / 2 + far * math.cos(angle), _HEIGHT / 2 + far * math.sin(angle)
        yield element("text", f"{10 * ring:g}", x=x, y=y + 3, text_anchor="middle", class_="unit")


def _polygon(model: Spokes, categories: Sequence[str]) -> Iterable[Markup]:
    count = len(categories)
    places = [
        _place(i, count, model.values[name]) if name in model.values else None
        for i, name in enumerate(categories)
    ]
    known = [place for place in places if place is not None]
    if len(known) == count:
        corners = " ".join(map(_corner, known))
        yield element(
            "polygon",
            points=corners,
            class_=f"series {'area ' if model.chosen else ''}{model.style}",
        )
    else:
        for i, place in enumerate(places):
            after = places[(i + 1) % count]
            if place and after:
                line = f"{_corner(place)} {_corner(after)}"
                yield element("polyline", points=line, class_=f"series {model.style}")
    for name, place in zip(categories, places, strict=True):
        if place is not None:
            title = element("title", f"{model.label}, {name}: {rating(model.values[name])}")
            yield element(
                "circle", title, cx=place[0], cy=place[1], r=2.6, class_=f"corner {model.style}"
            )


def _angle(index: int, count: int) -> float:
    """The first spoke points upwards, the others follow clockwise."""
    return 2.0 * math.pi * index / count - math.pi / 2.0


def _place(index: int, count: int, value: float) -> tuple[float, float]:
    angle, far = _angle(index, count), _REACH * min(max(value, 0.0), 1.15)
    return _WIDTH / 2 + far * math.cos(angle), _HEIGHT / 2 + far * math.sin(angle)


def _corner(place: tuple[float, float]) -> str:
    return f"{place[0]:.1f},{place[1]:.1f}"


@dataclass(frozen=True)
class PromptAnswers:
    """One prompt, its target, and every model's answer."""

    prompt: str
    target: str
    group: str | None
    answers: Mapping[str, Sample]

    @property
    def differs(self) -> bool:
        """Whether the answers differ in score."""
        return len({answer.score for answer in self.answers.values()}) > 1


@dataclass(frozen=True)
class Selection:
    """Prompts to show, out of how many there were and on how many of those models differ."""

    shown: tuple[PromptAnswers, ...]
    differing: int
    total: int


def selection(by_model: Mapping[str, Sequence[Sample]], most: int, length: int) -> Selection:
    """Select the prompts whose answers differ most, spread over the families of the task.

    A prompt ranks by the spread of the scores of its answers: of answers right or wrong, by how
    evenly it splits the models. No model's successes are preferred to another's. Equal ranks keep
    the order of the task.

    Args:
        by_model: the rows of each model.
        most: how many prompts to show.
        length: how many characters of a text to show.
    """
    every = _by_prompt(by_model)
    differing = [each for each in every if each.differs]
    families: dict[str | None, list[PromptAnswers]] = defaultdict(list)
    for each in sorted(differing or every, key=_spread, reverse=True):
        families[each.group].append(each)
    ranks = itertools.zip_longest(*families.values())
    chosen = [each for rank in ranks for each in rank if each is not None]
    shown = tuple(_shortened(each, length) for each in chosen[:most])
    return Selection(shown, len(differing), len(every))


def _by_prompt(by_model: Mapping[str, Sequence[Sample]]) -> list[PromptAnswers]:
    """Rows joined by prompt and target; a prompt that occurs twice is joined in its order."""
    found: dict[tuple[str, str, int], dict[str, Sample]] = {}
    for model, rows in by_model.items():
        seen: dict[tuple[str, str], int] = defaultdict(int)
        for row in rows:
            key = (row.prompt, row.target)
            found.setdefault((*key, seen[key]), {})[model] = row
            seen[key] += 1
    return [
        PromptAnswers(prompt, target, next((r.group for r in rows.values() if r.group), None), rows)
        for (prompt, target, _), rows in found.items()
    ]


def _spread(each: PromptAnswers) -> float:
    """Σ of squared differences between all pairs, up to a constant: n · Σ x² - (Σ x)²."""
    scores = [answer.score for answer in each.answers.values() if answer.score is not None]
    spread = len(scores) * math.fsum(x * x for x in scores) - math.fsum(scores) ** 2
    return round(spread, 9)


def _shortened(each: PromptAnswers, length: int) -> PromptAnswers:
    def first(text: str) -> str:
        left = len(text) - length
        return text if left <= 0 else f"{text[:length]}… [{count(left)} more characters]"

    answers = {
        model: replace(a, output=first(a.output), verdict=a.verdict and first(a.verdict))
        for model, a in each.answers.items()
    }
    return PromptAnswers(first(each.prompt), first(each.target), each.group, answers)
