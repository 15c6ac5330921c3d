"""The planes of forgetting: how far models moved from their base, against what they can do."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from dominie.core.results_file import read_task_sources
from dominie.core.task_result import FORGETTING
from dominie.report.scatter import NATS, PERCENT, RATING, Mark, Unit, scatter_chart

if TYPE_CHECKING:
    from collections.abc import Sequence

    from markupsafe import Markup

    from dominie.core.run_records import Run

_MOST = 2  # planes, side by side


@dataclass(frozen=True)
class Plane:
    """A chart of KL on one source across, and the score on another source's task upwards.

    Attributes:
        moved: the task of KL across.
        ability: the task of ability upwards.
        chart: the drawing.
    """

    moved: str
    ability: str
    chart: Markup


def forgetting_planes(run: Run, chosen: str | None) -> Sequence[Plane]:
    """Draw KL(base ‖ model) on a source against the first ability that is of another source.

    On the prompts of a new task it predicts what is forgotten of others (RL's Razor, arXiv
    2509.04259); on the prompts of others it is what a gain in the new task has cost.

    Args:
        run: its tasks of the metric `forgetting` are drawn, two at most.
        chosen: the model of the headline.
    """
    sources = read_task_sources(run.path)
    found = []
    for moved in (task for task in run.tasks if run.metric(task) == FORGETTING):
        abilities = (
            task
            for task in run.ability_tasks
            if sources.get(task) not in (sources.get(moved), None)
        )
        ability = next(abilities, None)
        marks = [] if ability is None else _marks(run, moved, ability, chosen)
        if ability is not None and len(marks) > 1:
            units = (NATS, unit_of(run, ability))
            chart = scatter_chart(f"KL on {moved}", ability, marks, [], units=units)
            found.append(Plane(moved, ability, chart))
    return found[:_MOST]


def unit_of(run: Run, task: str) -> Unit:
    """What the scores of a task are shown in."""
    return RATING if run.rated(task) else PERCENT


def _marks(run: Run, moved: str, ability: str, chosen: str | None) -> list[Mark]:
    marks = []
    for model, results in run.results.items():
        kl = results[moved].kl if moved in results else None
        if kl is not None and ability in results:
            score = results[ability]
            marks.append(
                Mark(
                    model,
                    kl.estimate,
                    score.score,
                    kl.ends,
                    score.ends,
                    trained=model in run.stages,
                    chosen=model == chosen,
                )
            )
    return marks
