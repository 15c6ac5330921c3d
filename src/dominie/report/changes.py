"""What changed from one model to another, task by task, and whether the change can be believed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from dominie.report.formats import points
from dominie.report.records import RATED

if TYPE_CHECKING:
    from dominie.report.records import Difference, Run, Score


@dataclass(frozen=True)
class Change:
    """A task's score of one model beside that of another, `after` beside `before`.

    Args:
        paired: their difference on the same questions, where that was computed.
    """

    task: str
    before: Score
    after: Score
    paired: Difference | None = None

    @property
    def difference(self) -> float:
        """After minus before, as a fraction."""
        return self.after.score - self.before.score

    @property
    def within_noise(self) -> bool:
        """Whether the scores cannot be told apart; without intervals only equal ones cannot.

        The interval of the difference on the same questions decides, else whether the two
        intervals overlap, which errs on the side of claiming too little.
        """
        if self.paired is not None:
            return self.paired.within_noise
        overlap = self.after.overlaps(self.before)
        return self.difference == 0 if overlap is None else overlap

    @property
    def rated(self) -> bool:
        """Whether the scores are ratings from 1 to 10."""
        return self.after.metric == RATED

    @property
    def size(self) -> str:
        """How large the difference is, in points of 100, or of 10 where ratings are compared."""
        return points(self.difference, rated=self.rated)

    @property
    def kept(self) -> float | None:
        """The part of the earlier score that is left."""
        return self.after.score / self.before.score if self.before.score > 0 else None


def change(run: Run, task: str, model: str, baseline: str) -> Change:
    """The change on a task that both models were measured on."""
    before, after = run.results[baseline][task], run.results[model][task]
    return Change(task, before, after, run.difference(task, model, baseline))


def changes(run: Run, model: str, baseline: str) -> tuple[Change, ...]:
    """The tasks of ability on which both models were measured, in order."""
    shared = run.results[model].keys() & run.results[baseline].keys()
    return tuple(change(run, task, model, baseline) for task in run.ability_tasks if task in shared)
