"""What changed from one model to another, and how like their teacher models are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from dominie.core.results import RATED, within_noise
from dominie.report.formatting import THIN, Part, Sentence, figure, joined, percent, points

if TYPE_CHECKING:
    from dominie.core.results import Interval, TaskResult
    from dominie.core.run_records import Run


@dataclass(frozen=True)
class Change:
    """A task's score of one model beside that of another, `after` beside `before`.

    Args:
        paired: their difference on the same questions, where that was computed.
    """

    task: str
    before: TaskResult
    after: TaskResult
    paired: Interval | None = None

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
        noise = within_noise(self.after, self.before, self.paired)
        return self.difference == 0 if noise is None else noise

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


class Likeness(NamedTuple):
    """A headline about agreement with the teacher, what supports it, and whom it is about."""

    headline: Sentence
    support: tuple[Sentence, ...]
    model: str


def candidates(run: Run) -> list[str]:
    """The models a run may be about: those trained and teaching nobody, if there are any."""
    teachers = {name for stage in run.stages.values() for name in stage.teacher_names}
    trained = [name for name in run.results if name in run.stages]
    final = [name for name in trained if name not in teachers]
    return final or trained or list(run.results)


def ability_of(run: Run, model: str) -> list[str]:
    """The tasks that measured what this model can do."""
    return [task for task in run.ability_tasks if task in run.results[model]]


def telling_tasks(run: Run) -> tuple[str, ...]:
    """The tasks that tell models apart: of ability where any is solved at all, else of likeness."""
    abilities = run.ability_tasks
    if any(scores[t].score for scores in run.results.values() for t in abilities if t in scores):
        return abilities
    return tuple(task for task in run.tasks if task not in abilities)


def likeness(run: Run) -> Likeness | None:
    """How far the likest model agrees with the teacher; None where that was not measured."""
    tasks = [task for task in run.tasks if run.metric(task) == "agreement"]
    known = [name for name in candidates(run) if any(task in run.results[name] for task in tasks)]
    if not known:
        return None
    model = max(
        known,
        key=lambda n: sum(run.results[n][task].score for task in tasks if task in run.results[n]),
    )
    clauses = [_clause(run, model, task) for task in tasks if task in run.results[model]]
    headline = (Part(model, "model"), Part(" agrees with the teacher on "), *joined(clauses))
    unsolved = ability_of(run, model)
    support: tuple[Sentence, ...] = ()
    if unsolved:
        names = joined([(Part(task, "task"),) for task in unsolved[:3]])
        support = ((Part("No model solved anything in "), *names, Part(" yet.")),)
    return Likeness((*headline, Part(".")), support, model)


def _clause(run: Run, model: str, task: str) -> Sentence:
    """`41.2 % of the tokens of general (KL 2.31 nats, 12 points above sft)`."""
    score = run.results[model][task]
    told = [f"KL {figure(score.extras['kl'])} nats"] if "kl" in score.extras else []
    parent = run.parent(model)
    if parent and task in run.results[parent]:
        step = change(run, task, model, parent)
        size = percent(abs(step.difference))
        side = "above" if step.difference > 0 else "below"
        told.append("within noise of" if step.within_noise else f"{size} points {side}")
    else:
        parent = None
    brackets = f" ({', '.join(told)}" if told else ""
    after = (Part(" "), Part(parent, "model")) if parent else ()
    return (
        Part(f"{percent(score.score)}{THIN}% of the tokens of "),
        Part(task, "task"),
        Part(brackets),
        *after,
        Part(")" if told else ""),
    )
